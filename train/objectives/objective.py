"""The protocol of training objectives.

An objective returns the loss summed over tokens; module.py divides by the loss tokens of the whole optimiser step.

Legend: E exits, N positions, D hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

    from draftsmith.train.drafts.exits import ExitStates, TrainContext


class LossSums(NamedTuple):
    """`total` is differentiated; `per_exit_E` are the unweighted token sums, for reporting."""

    total: torch.Tensor
    per_exit_E: torch.Tensor


class Objective(Protocol):
    """SFT, SoFT, Distil, or a class of yours that a recipe names by `class_path`. run.json records its attributes."""

    @property
    def whole_draft(self) -> bool:
        """Whether it decodes with the draft while training, so that no strategy may shard the draft."""
        ...

    def exits(self, num_layers: int) -> list[int]:
        """The exits at which a draft of `num_layers` is trained; ValueError if it cannot have them."""
        ...

    def begin(self, run: TrainContext) -> None:
        """Prepare what the objective needs besides the draft; called once, before the first step."""
        ...

    def __call__(self, draft: ExitStates, batch: dict[str, torch.Tensor]) -> LossSums: ...
