"""Our own decoding as a runner: prompts in, generations out, every one through the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from draftsmith.infer.contract.protocols import AnswerLearner, Budget, Drafter, Target
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.engine.generate import BUDGET, generate
from draftsmith.infer.measure.runner import Prompt

PASSES = 4


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
        """Tell a control the answers; it is no part of what is measured.

        In half precision an answer may turn at a numeric tie that a longer draft rounds the other way. The oracle's
        ceiling is that of drafts that are right, so it is told what comes out when it drafts, until that stands.
        """
        if not isinstance(self.drafter, AnswerLearner):
            return
        told = self._answers(Empty(), prompts)
        self.drafter.learn(told)
        for _ in range(PASSES if self.drafter.exact else 0):
            before, told = told, self._answers(self.drafter, prompts)
            if told == before:
                return
            self.drafter.learn(told)

    def _answers(self, drafter: Drafter, prompts: Sequence[Prompt]) -> dict[str, list[int]]:
        answers = generate(self.target, drafter, self._rows(prompts), batch_size=len(prompts), budget=self.budget)
        return {answer.row: answer.token_ids for answer in answers}

    def run(self, prompts: Sequence[Prompt]) -> list[Generation]:
        drafter = self.drafter or Empty()
        return generate(self.target, drafter, self._rows(prompts), batch_size=len(prompts), budget=self.budget)

    def _rows(self, prompts: Sequence[Prompt]) -> list[Row]:
        tokenizer = self.target.tokenizer
        return [Row(p.key, list(p.token_ids), self.settings, self.stops, tokenizer) for p in prompts]
