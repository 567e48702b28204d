"""A small language model as the draft to train, cut from its target or of another shape; exits.py runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from draftsmith.infer.models.layers import find_parts
from draftsmith.train.drafts.exits import ExitStates
from draftsmith.train.drafts.init import freeze, init_draft
from draftsmith.train.drafts.lora import add_lora
from draftsmith.train.drafts.trainable import BuildContext


@dataclass(frozen=True, slots=True)
class LMBuilder:
    """The options of TrainConfig that concern the draft, and the exits that the objective trains."""

    exits: Sequence[int]
    num_layers: int
    init: str = "first"
    shape: dict[str, int] | None = None
    freeze: Sequence[str] = ()
    lora_rank: int = 0

    def check(self, strategy: str, checkpointing: bool) -> None:
        """The objective has checked the exits, and every strategy trains such drafts."""

    def build(self, run: BuildContext) -> ExitStates:
        model = init_draft(
            run.target, num_layers=self.num_layers, how=self.init, shape=self.shape, seed=run.seed, dtype=run.dtype
        )
        freeze(model, self.freeze)
        if self.lora_rank:
            add_lora(model, self.lora_rank, run.seed)
        if run.checkpointing:
            # transformers has renamed the method and will drop the old name.
            new = getattr(model, "activation_checkpointing_enable", None)
            (new or model.gradient_checkpointing_enable)({"use_reentrant": False})
        if run.compile:
            for layer in find_parts(model).layers:
                layer.compile()
        return ExitStates(model.train(), self.exits)
