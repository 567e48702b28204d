"""Sorted fine-tuning: one draft trained for several exit depths (arXiv 2309.08968; for drafts 2407.01955).

The loss is a weighted sum over the exits of the cross-entropy of head(norm(state at exit)); by default their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `--help` reads this class, and should not wait for torch
    import torch

    from draftsmith.train.drafts.exits import ExitStates, TrainContext
    from draftsmith.train.objectives.objective import LossSums


class SoFT:
    """The objective of `draftsmith train soft`.

    Args:
        exits: layer counts after which the draft can exit; the last is num_layers.
        exit_weights: loss weight of each exit, scaled to sum to one; default: equal.
    """

    whole_draft = False

    def __init__(self, exits: Sequence[int], exit_weights: Sequence[float] | None = None) -> None:
        if not exits:
            raise ValueError("exits is empty: give the layer counts after which the draft can exit, such as 6 9 12")
        given = [1.0] * len(exits) if exit_weights is None else list(exit_weights)
        if len(given) != len(exits):
            raise ValueError(f"{len(given)} exit weights for {len(exits)} exits: give one for each")
        if min(given, default=0.0) < 0 or sum(given) <= 0:
            raise ValueError(f"exit weights {given} must not be negative, nor all zero")
        self._exits = list(exits)
        self.weights = [weight / sum(given) for weight in given]

    def exits(self, num_layers: int) -> list[int]:
        from draftsmith.train.drafts.exits import check_exits

        return list(check_exits(self._exits, num_layers))

    def begin(self, run: TrainContext) -> None:
        """Nothing besides the draft is needed."""

    def __call__(self, draft: ExitStates, batch: dict[str, torch.Tensor]) -> LossSums:
        from draftsmith.train.objectives.chunked_loss import chunked_cross_entropy

        states_END, labels_N = draft(batch)
        return chunked_cross_entropy(
            states_END, draft.head, labels_N, self.weights, scale=draft.scale, softcap=draft.softcap
        )
