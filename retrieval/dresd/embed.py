"""The target's states at given positions.

States come through `target.admit`, as the drafter's do: what a store is built from is what it is asked with. A feature
is `last` (after the final norm) or `layer:k` (before layer k). Stores and indexes are not known here.

Legend: T positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from draftsmith.infer.contract.protocols import Target
from draftsmith.infer.contract.row import Row, Stops


def embed(target: Target, sequences: Sequence[Sequence[int]], feature: str, batch_positions: int) -> list[torch.Tensor]:
    """[T - 1, D] per sequence: state i predicted token i + 1. Sequences of like length run together.

    `batch_positions` bounds a pass, padding included; a sequence that is longer runs alone.
    """
    order = sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), i))
    found: dict[int, torch.Tensor] = {}
    while order:
        longest = len(sequences[order[-1]])
        chosen = [order.pop() for _ in range(min(max(batch_positions // longest, 1), len(order)))]
        rows = [Row(str(i), list(sequences[i]), stops=Stops(1)) for i in chosen]
        feedback = target.admit(rows, (feature,))
        target.release(rows)
        for i, given in zip(chosen, feedback):
            found[i] = given.features[feature]
    return [found[i] for i in range(len(sequences))]
