"""The protocol of training objectives.

An objective returns the loss summed over tokens; module.py divides by the loss tokens of the whole optimiser step.

Legend: E exits, heads or unrolls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

    from draftsmith.train.drafts.exits import TrainContext
    from draftsmith.train.drafts.trainable import Curves


class LossSums(NamedTuple):
    """`total` is differentiated; `per_exit_E` are the unweighted token sums, for reporting: divided by `counts_E`, the
    tokens that each is a sum over, or by the number of loss tokens where that is None."""

    total: torch.Tensor
    per_exit_E: torch.Tensor
    counts_E: torch.Tensor | None = None


class Losses(Protocol):
    """What every objective has, whatever kind of draft it trains. run.json records its attributes."""

    @property
    def whole_draft(self) -> bool:
        """Whether it decodes with the draft while training, so that no strategy may shard the draft."""
        ...

    def begin(self, run: TrainContext) -> None:
        """Prepare what the objective needs besides the draft; called once, before the first step."""
        ...

    def __call__(self, draft: Any, batch: dict[str, torch.Tensor]) -> LossSums: ...


class Objective(Losses, Protocol):
    """SFT, SoFT, Distil, or a class of yours that a recipe names by `class_path`: trains a small language model, whose
    Trainable is ExitStates."""

    def exits(self, num_layers: int) -> list[int]:
        """The exits at which a draft of `num_layers` is trained; ValueError if it cannot have them."""
        ...


class HeadObjective(Losses, Protocol):
    """Trains heads on the target's states."""

    def curves(self, builder: Any) -> Curves:
        """By what the losses of the heads that `builder` makes are reported; ValueError if it cannot train them."""
        ...
