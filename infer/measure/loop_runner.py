"""Our own decoding as a runner: prompts in, generations out, every one through the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from draftsmith.infer.contract import Budget, Drafter, Target
from draftsmith.infer.drafters.controls import Empty, Told
from draftsmith.infer.generate import BUDGET, generate
from draftsmith.infer.measure.runner import Prompt
from draftsmith.infer.row import Row, Stops
from draftsmith.infer.settings import Settings
from draftsmith.infer.trace import Generation


@dataclass(slots=True)
class LoopRunner:
    """Decodes with one drafter; None is plain decoding. The drafter is bound here."""

    name: str
    target: Target
    drafter: Drafter | None
    settings: Settings
    stops: Stops
    budget: Budget = BUDGET

    def __post_init__(self) -> None:
        if self.drafter is not None:
            self.drafter.bind(self.target)

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Tell a control the plain answers; it is no part of what is measured."""
        if isinstance(self.drafter, Told):
            plain = generate(self.target, Empty(), self._rows(prompts), batch_size=len(prompts))
            self.drafter.learn({answer.row: answer.token_ids for answer in plain})

    def run(self, prompts: Sequence[Prompt]) -> list[Generation]:
        drafter = self.drafter or Empty()
        return generate(self.target, drafter, self._rows(prompts), batch_size=len(prompts), budget=self.budget)

    def _rows(self, prompts: Sequence[Prompt]) -> list[Row]:
        tokenizer = self.target.tokenizer
        return [Row(p.key, list(p.token_ids), self.settings, self.stops, tokenizer) for p in prompts]
