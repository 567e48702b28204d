"""Questions, the prompts made of them, and the runners that answer: what a benchmark compares.

`LoopRunner` decodes through our own step; transformers' decoders are in peers.py. A runner whose generations have no
traces is measured by wall time alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from draftsmith.infer.contract.draft import ROOT, Draft, Trial
from draftsmith.infer.contract.protocols import AnswerLearner, Budget, Drafter, Rule, Target, Verdict
from draftsmith.infer.contract.rng import StepRng
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.engine.engine import BUDGET, CHUNK, Engine
from draftsmith.infer.rules.named import DEFAULT
from draftsmith.infer.text.record import Message, Record
from draftsmith.infer.text.rendering import Template

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

    @classmethod
    def of(cls, record: Record) -> Question:
        """The user's turns of a record; a numeric id becomes a number, as Spec-Bench's own scripts expect."""
        number = int(record.id) if record.id.isdecimal() else record.id
        return cls(number, record.category, tuple(record.questions), record.system)

    def head(self) -> Messages:
        """The messages before the first turn."""
        return [{"role": "system", "content": self.system}] if self.system else []


def check_questions(questions: Sequence[Question]) -> None:
    """ValueError unless these can be measured: some, each with turns and an id of its own."""
    if not questions:
        raise ValueError("there are no questions to measure with")
    seen: set[int | str] = set()
    for question in questions:
        if question.id in seen:
            raise ValueError(f"question {question.id!r} occurs twice: give every question its own id")
        if not question.turns:
            raise ValueError(f"question {question.id!r} has no turns")
        seen.add(question.id)


def coders(template: Template) -> tuple[Encode, Decode]:
    """How the messages of a question become token ids, and an answer's token ids text."""

    def encode(messages: Messages) -> list[int]:
        return template.prompt_ids([Message(**message) for message in messages])

    def decode(token_ids: list[int]) -> str:
        return str(template.tokenizer.decode(token_ids, skip_special_tokens=True))

    return encode, decode


class Runner(Protocol):
    """Answers a batch of prompts: one generation each, in order. After an error it is ready for the next batch."""

    @property
    def name(self) -> str: ...

    @property
    def drawn(self) -> bool:
        """Whether its answers have plain decoding's distribution, and are not the same tokens: its drafts are drawn, or
        it samples with random numbers of its own."""
        ...

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Untimed work before `run`."""
        ...

    def run(self, prompts: Sequence[Prompt]) -> list[Generation]: ...


@dataclass(slots=True)
class LoopRunner:
    """Decodes with one drafter, which it binds to the target; None is plain decoding.

    A drafter that learns from answers does not learn here: a question that is asked again, to warm up or to repeat it,
    would find its own answer, and the order of questions would decide the figures.
    """

    name: str
    target: Target
    drafter: Drafter | None
    settings: Settings
    stops: Stops
    budget: Budget = BUDGET
    rule: str | Rule = DEFAULT
    _policy: Policy = field(init=False, default_factory=Policy)

    def __post_init__(self) -> None:
        if self.drafter is not None:
            self.drafter.bind(self.target)
            self._policy = Policy.of(self.target, self.drafter)

    @property
    def drawn(self) -> bool:
        return not self.settings.greedy and bool(getattr(self.drafter, "draws", False))

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

    def logits_again(
        self, prompts: Sequence[Prompt], answers: Mapping[str, Sequence[int]], key: str, index: int
    ) -> torch.Tensor:
        """[V] the logits behind token `index` of row `key`, after processors: decodes the given answers again."""
        self.prepare(prompts)
        watch = FollowAnswers(answers, {prompt.key: len(prompt.token_ids) for prompt in prompts}, key, index)
        try:
            self._generate(self.drafter or Empty(), prompts, watch)
        except Found as found:
            return found.logits_V
        raise AssertionError(f"row {key} ended before its token {index}")

    def _answers(self, drafter: Drafter, prompts: Sequence[Prompt]) -> dict[str, list[int]]:
        return {answer.row: answer.token_ids for answer in self._generate(drafter, prompts)}

    def _generate(self, drafter: Drafter, prompts: Sequence[Prompt], rule: Rule | None = None) -> list[Generation]:
        tokenizer = self.target.tokenizer
        rows = [Row(prompt.key, list(prompt.token_ids), self.settings, self.stops, tokenizer) for prompt in prompts]
        # All prompts of a batch are read together, so that its rows start together in every runner.
        count = len(prompts)
        policy = self._policy if drafter is self.drafter else Policy()
        policy.batch_size = count
        engine = Engine(
            self.target, drafter, batch_size=count, budget=self.budget, rule=rule or self.rule, policy=policy,
            chunk=CHUNK * count, learn=False,
        )  # fmt: skip
        return engine.run(rows, strict=True)


class Found(Exception):
    """Ends the decoding of `FollowAnswers` with the logits that it looked for."""

    def __init__(self, logits_V: torch.Tensor) -> None:
        self.logits_V = logits_V


@dataclass(frozen=True, slots=True)
class FollowAnswers:
    """A rule that commits given answers, whatever the logits say, and raises `Found` at token `index` of row `key`.

    `starts`: prompt lengths by row. A draft is accepted as far as it agrees with the answer, so that the passes are
    those of the run that gave the answers.
    """

    answers: Mapping[str, Sequence[int]]
    starts: Mapping[str, int]
    key: str
    index: int

    def __call__(self, draft: Draft, distribution: Any, rng: StepRng) -> Verdict:
        at = rng.position - self.starts[rng.row]
        ahead = self.answers[rng.row][at:]
        node, path, accepted = ROOT, list[int](), list[Trial]()
        for depth, token in enumerate(ahead):
            if rng.row == self.key and at + depth == self.index:
                raise Found(distribution.logits(node))
            trials = draft.trials.get(node, ())
            found = next((trial for trial in trials if draft.tokens[trial.node] == token), None)
            if found is None or depth == len(ahead) - 1:
                return Verdict(path, accepted, token)
            node = found.node
            path.append(node)
            accepted.append(found)
        raise AssertionError(f"row {rng.row} goes on after the end of its answer")
