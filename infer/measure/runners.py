"""Questions, the prompts made of them, and the runners that answer: what a benchmark compares.

`LoopRunner` decodes through our own step; transformers' decoders are in peers.py. A runner whose generations have no
traces is measured by wall time alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from draftsmith.infer.contract.protocols import AnswerLearner, Budget, Drafter, Target
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.engine.generate import BUDGET, generate

Messages = list[dict[str, str]]
Encode = Callable[[Messages], list[int]]
Decode = Callable[[list[int]], str]

# How often the oracle's script is corrected, at most.
PASSES = 4


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row to decode. `key` seeds its random streams: the same question and turn has the same key in every runner."""

    key: str
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class Question:
    """The user's turns; each later turn is asked after the runner's own answers to the earlier ones."""

    id: int | str
    category: str
    turns: tuple[str, ...]
    system: str | None = None

    def head(self) -> Messages:
        """The messages before the first turn."""
        return [{"role": "system", "content": self.system}] if self.system else []


class Runner(Protocol):
    """Answers a batch of prompts: one generation each, in order. After an error it is ready for the next batch."""

    @property
    def name(self) -> str: ...

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Untimed work before `run`."""
        ...

    def run(self, prompts: Sequence[Prompt]) -> list[Generation]: ...


@dataclass(slots=True)
class LoopRunner:
    """Decodes with one drafter, which it binds to the target; None is plain decoding."""

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
        """Give a scripted drafter the answers.

        In half precision, a longer draft may round a numeric tie the other way and so change the answer. The oracle
        must draft the answer it will see, so it decodes with its own script until the answers no longer change.
        """
        if not isinstance(self.drafter, AnswerLearner):
            return
        answers = self._answers(Empty(), prompts)
        self.drafter.learn(answers)
        for _ in range(PASSES if self.drafter.exact else 0):
            before, answers = answers, self._answers(self.drafter, prompts)
            if answers == before:
                return
            self.drafter.learn(answers)

    def run(self, prompts: Sequence[Prompt]) -> list[Generation]:
        return self._generate(self.drafter or Empty(), prompts)

    def _answers(self, drafter: Drafter, prompts: Sequence[Prompt]) -> dict[str, list[int]]:
        return {answer.row: answer.token_ids for answer in self._generate(drafter, prompts)}

    def _generate(self, drafter: Drafter, prompts: Sequence[Prompt]) -> list[Generation]:
        tokenizer = self.target.tokenizer
        rows = [Row(prompt.key, list(prompt.token_ids), self.settings, self.stops, tokenizer) for prompt in prompts]
        return generate(self.target, drafter, rows, batch_size=len(prompts), budget=self.budget)
