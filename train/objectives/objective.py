"""What every training objective is: exits that it reads, and a token sum over their states.

An objective returns sums; the division by the loss tokens of the whole optimiser step is the trainer's (training.py).

Legend: E exits, N positions, D hidden.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from draftsmith.train.drafts.context import TrainContext
from draftsmith.train.drafts.exits import ExitStates


class LossSums(NamedTuple):
    """`total` is differentiated; `per_exit_E` are the plain token sums to report."""

    total: torch.Tensor
    per_exit_E: torch.Tensor


class Objective(Protocol):
    """One of sft.SFT, soft.SoFT, ...: recipes name it by its dotted path."""

    def exits(self, num_layers: int) -> list[int]:
        """The exits that a draft of so many layers is trained at; ValueError where it cannot have them."""
        ...

    def begin(self, run: TrainContext) -> None:
        """Make ready what the objective needs beside the draft; called once, before the first step."""
        ...

    def __call__(self, draft: ExitStates, batch: dict[str, torch.Tensor]) -> LossSums: ...
