"""Sorted fine-tuning: one draft trained to leave at several depths (arXiv 2309.08968; for drafts 2407.01955).

The loss is a weighted sum over the exits of the cross-entropy of head(norm(state at exit)); by default their mean.
Which text that is, and what the sum is divided by, is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from draftsmith.train.drafts.context import TrainContext
from draftsmith.train.drafts.exits import ExitStates, check_exits
from draftsmith.train.objectives.chunked_loss import chunked_cross_entropy
from draftsmith.train.objectives.objective import LossSums


class SoFT:
    """The objective of `draftsmith train soft`.

    Args:
        exits: numbers of layers after which the draft can be left; the last one is its whole depth.
        weights: one per exit; not given: equal. They are scaled to sum to one.
    """

    def __init__(self, exits: Sequence[int], weights: Sequence[float] | None = None) -> None:
        given = [1.0] * len(exits) if weights is None else list(weights)
        if len(given) != len(exits):
            raise ValueError(f"{len(given)} exit weights for {len(exits)} exits: give one for each")
        if min(given, default=0.0) < 0 or sum(given) <= 0:
            raise ValueError(f"exit weights {given} must not be negative, and not all zero")
        self._exits = list(exits)
        self.weights = [weight / sum(given) for weight in given]

    def exits(self, num_layers: int) -> list[int]:
        return list(check_exits(self._exits, num_layers))

    def begin(self, run: TrainContext) -> None:
        """Nothing is needed beside the draft."""

    def __call__(self, draft: ExitStates, batch: dict[str, torch.Tensor]) -> LossSums:
        states_END, labels_N = draft(batch)
        return LossSums(
            *chunked_cross_entropy(
                states_END, draft.head, labels_N, self.weights, scale=draft.scale, softcap=draft.softcap
            )
        )
