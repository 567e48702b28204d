"""Supervised fine-tuning: cross-entropy of the whole draft on the assistant's turns.

Which text that is, and what the sum is divided by, is not known here.
"""

from __future__ import annotations

import torch

from draftsmith.train.drafts.context import TrainContext
from draftsmith.train.drafts.exits import ExitStates
from draftsmith.train.objectives.chunked_loss import chunked_cross_entropy
from draftsmith.train.objectives.objective import LossSums


class SFT:
    """The objective of `draftsmith train sft`."""

    def exits(self, num_layers: int) -> list[int]:
        return [num_layers]

    def begin(self, run: TrainContext) -> None:
        """Nothing is needed beside the draft."""

    def __call__(self, draft: ExitStates, batch: dict[str, torch.Tensor]) -> LossSums:
        states_END, labels_N = draft(batch)
        return LossSums(
            *chunked_cross_entropy(states_END, draft.head, labels_N, [1.0], scale=draft.scale, softcap=draft.softcap)
        )
