"""Supervised fine-tuning: cross-entropy of the whole draft on the assistant's turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `--help` reads this class, and should not wait for torch
    import torch

    from draftsmith.train.drafts.exits import ExitStates, TrainContext
    from draftsmith.train.objectives.objective import LossSums


class SFT:
    """The objective of `draftsmith train sft`.

    Args:
        exits: must be [num_layers] or absent: SFT trains one exit, the whole draft.
    """

    whole_draft = False

    def __init__(self, exits: Sequence[int] | None = None) -> None:
        self._exits = None if exits is None else list(exits)

    def exits(self, num_layers: int) -> list[int]:
        if self._exits not in (None, [num_layers]):
            raise ValueError(
                f"exits {self._exits}: sft trains one exit, the whole draft; for several use `draftsmith train soft`"
            )
        return [num_layers]

    def begin(self, run: TrainContext) -> None:
        """Nothing besides the draft is needed."""

    def __call__(self, draft: ExitStates, batch: dict[str, torch.Tensor]) -> LossSums:
        from draftsmith.train.objectives.chunked_loss import chunked_cross_entropy

        states_END, labels_N = draft(batch)
        return chunked_cross_entropy(states_END, draft.head, labels_N, [1.0], scale=draft.scale, softcap=draft.softcap)
