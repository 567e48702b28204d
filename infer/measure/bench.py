"""The benchmark loop: every runner answers every question, interleaved in random order.

An error affects one question of one runner only, and a failed question has no figures. Wall time is taken around the
runner's call alone; the rows of a batch share it equally.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from draftsmith.infer.contract.trace import Generation, StepTrace
from draftsmith.infer.files.errors import first_line
from draftsmith.infer.measure.runners import Decode, Encode, Messages, Prompt, Question, Runner, check_questions

Clock = Callable[[], float]

BANDWIDTH_BYTES = 256 << 20
BANDWIDTH_TRIES = 5


@dataclass(slots=True)
class Turn:
    text: str
    generation: Generation
    wall_s: float


@dataclass(slots=True)
class Outcome:
    """One runner's answer to one question, once. If `error` is set, there are no turns."""

    turns: list[Turn] = field(default_factory=list)
    error: str = ""

    @property
    def token_ids(self) -> list[list[int]]:
        return [turn.generation.token_ids for turn in self.turns]

    @property
    def traces(self) -> list[StepTrace]:
        return [trace for turn in self.turns for trace in turn.generation.traces]


# One group of questions, answered by every runner: the runner's name -> an outcome per question.
Visit = dict[str, list[Outcome]]


@dataclass(frozen=True, slots=True)
class BenchProgress:
    """`questions` that all runners have answered, repeats included, of `total`; the last run's runner and tokens/s.

    `seconds_left` assumes that the runs to come take as long as those so far.
    """

    questions: int
    total: int
    runner: str
    tokens_per_s: float
    seconds_left: float

    @property
    def done(self) -> bool:
        return self.questions == self.total

    def line(self) -> str:
        minutes, seconds = divmod(round(self.seconds_left), 60)
        left = f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
        return f"{self.questions}/{self.total} questions, {self.runner} {self.tokens_per_s:.1f} tokens/s, {left} left"


@dataclass(slots=True)
class Measured:
    """outcomes[runner's name][question's id]: one outcome per repeat. `drawn`: the runners whose answers need not
    equal plain decoding's token by token (`Runner.drawn`)."""

    questions: list[Question]
    baseline: str
    batch_size: int
    seed: int
    repeats: int
    outcomes: dict[str, dict[int | str, list[Outcome]]]
    drawn: frozenset[str] = frozenset()

    def error(self, name: str, question_id: int | str) -> str:
        """The first error of a question's repeats, or ''."""
        return next((outcome.error for outcome in self.outcomes[name][question_id] if outcome.error), "")

    def all_failed(self) -> str:
        """The first error if no runner has answered any question, else ''."""
        found = [one.error for by_id in self.outcomes.values() for several in by_id.values() for one in several]
        return found[0] if all(found) else ""


def bench(
    runners: Sequence[Runner],
    questions: Sequence[Question],
    encode: Encode,
    decode: Decode,
    *,
    batch_size: int = 1,
    seed: int = 0,
    warmup: int = 1,
    repeats: int = 1,
    baseline: str = "plain",
    progress: Callable[[BenchProgress], None] | None = None,
    clock: Clock = time.perf_counter,
    done: Sequence[Visit] = (),
    on_visit: Callable[[Visit], None] | None = None,
) -> Measured:
    """Measure all runners on each group of `batch_size` questions, in a newly drawn order, before the next group.

    Each runner first answers `warmup` groups that are not counted. `done` are the first visits, measured before;
    `on_visit` gets each further one. A visit is whole, so a question's runners are always timed in one process.
    """
    _check(runners, questions, batch_size, repeats, baseline)
    groups = [list(questions[at : at + batch_size]) for at in range(0, len(questions), batch_size)]
    visits = list(_interleaved(groups, runners, repeats, seed))
    assert len(done) <= len(visits), "more visits are done than there are"
    for runner in runners if len(done) < len(visits) else ():
        _warm(runner, groups, warmup, encode, decode, clock)
    outcomes: dict[str, dict[int | str, list[Outcome]]] = {
        runner.name: {question.id: [] for question in questions} for runner in runners
    }
    drawn = frozenset(runner.name for runner in runners if runner.drawn)
    measured = Measured(list(questions), baseline, batch_size, seed, repeats, outcomes, drawn)
    for (group, _), visit in zip(visits, done):
        _file(measured, group, visit)
    began, runs, answered = clock(), 0, sum(len(group) for group, _ in visits[: len(done)])
    for group, order in visits[len(done) :]:
        visit = {}
        for place, runner in enumerate(order, start=1):
            visit[runner.name] = answer(runner, group, encode, decode, clock)
            runs += 1
            answered += len(group) if place == len(order) else 0
            if progress is not None:
                left = ((len(visits) - len(done)) * len(order) - runs) * (clock() - began) / runs
                rate = _tokens_per_s(visit[runner.name])
                progress(BenchProgress(answered, repeats * len(questions), runner.name, rate, left))
        if on_visit is not None:
            on_visit(visit)
        _file(measured, group, visit)
    return measured


def _file(measured: Measured, group: Sequence[Question], visit: Visit) -> None:
    for name, outcomes in visit.items():
        for question, outcome in zip(group, outcomes, strict=True):
            measured.outcomes[name][question.id].append(outcome)


def _tokens_per_s(outcomes: Sequence[Outcome]) -> float:
    """End to end; 0 if all failed."""
    turns = [turn for outcome in outcomes for turn in outcome.turns]
    seconds = sum(turn.wall_s for turn in turns)
    return sum(len(turn.generation.token_ids) for turn in turns) / seconds if seconds else 0.0


def _check(
    runners: Sequence[Runner], questions: Sequence[Question], batch_size: int, repeats: int, baseline: str
) -> None:
    names = [runner.name for runner in runners]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two runners are called {name!r}: give one of them another name")
    if baseline not in names:
        raise ValueError(f"no runner is called {baseline!r}, the baseline; there are {', '.join(names)}")
    check_questions(questions)
    for name, value in (("batch_size", batch_size), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be 1 or more")


def _interleaved(
    groups: list[list[Question]], runners: Sequence[Runner], repeats: int, seed: int
) -> Iterator[tuple[list[Question], list[Runner]]]:
    """Each group with the order of its runners, which depends on the seed only."""
    order = random.Random(seed)
    for _ in range(repeats):
        for group in groups:
            yield group, order.sample(list(runners), len(runners))


def _warm(
    runner: Runner, groups: list[list[Question]], count: int, encode: Encode, decode: Decode, clock: Clock
) -> None:
    """Answer `count` groups. A group that fails does not count as warm-up; its error shows when it is measured."""
    for group in groups:
        if count <= 0:
            return
        outcomes = answer(runner, group, encode, decode, clock)
        count -= not all(outcome.error for outcome in outcomes)


def answer(
    runner: Runner, questions: Sequence[Question], encode: Encode, decode: Decode, clock: Clock
) -> list[Outcome]:
    """The runner's answers to a batch of questions, turn by turn; a failed question gets no further turns."""
    outcomes = [Outcome() for _ in questions]
    messages: list[Messages] = [question.head() for question in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        asked: list[int] = []
        prompts: list[Prompt] = []
        for index, question in enumerate(questions):
            if outcomes[index].error or turn >= len(question.turns):
                continue
            messages[index].append({"role": "user", "content": question.turns[turn]})
            try:
                token_ids = encode(messages[index])
            except Exception as error:  # an error of any kind fails this question only
                outcomes[index] = Outcome(error=_one_line(error))
                continue
            asked.append(index)
            prompts.append(Prompt(f"{question.id}/{turn}", token_ids))
        for index, ran in zip(asked, run_apart(runner, prompts, clock)):
            try:
                done = _turn(ran, decode)
            except Exception as error:
                outcomes[index] = Outcome(error=_one_line(error))
                continue
            outcomes[index].turns.append(done)
            messages[index].append({"role": "assistant", "content": done.text})
    return outcomes


def _turn(ran: tuple[Generation, float] | Exception, decode: Decode) -> Turn:
    if isinstance(ran, Exception):
        raise ran
    generation, wall_s = ran
    return Turn(decode(generation.token_ids), generation, wall_s)


def run_apart(runner: Runner, prompts: Sequence[Prompt], clock: Clock) -> list[tuple[Generation, float] | Exception]:
    """Each prompt's generation and its share of the wall time, or its own error.

    If a batch fails, its prompts are run one by one to find the failing ones; the others then run together, and the
    figures come from that run. A batch that fails only as a whole (too big, say) fails for all its prompts.
    """
    if not prompts:
        return []
    try:
        runner.prepare(prompts)
        start = clock()
        generations = runner.run(prompts)
        share = (clock() - start) / len(prompts)
        if len(generations) != len(prompts):
            raise RuntimeError(f"{runner.name} gave {len(generations)} answers to {len(prompts)} prompts")
        return [(generation, share) for generation in generations]
    except Exception as error:
        failed: Exception = error
    if len(prompts) == 1:
        return [failed]
    errors = {index: found for index, prompt in enumerate(prompts) if (found := _fails_alone(runner, prompt))}
    if not errors:
        return [failed] * len(prompts)
    rest = iter(run_apart(runner, [prompt for index, prompt in enumerate(prompts) if index not in errors], clock))
    return [errors[index] if index in errors else next(rest) for index in range(len(prompts))]


def _fails_alone(runner: Runner, prompt: Prompt) -> Exception | None:
    try:
        runner.prepare([prompt])
        runner.run([prompt])
    except Exception as error:
        return error
    return None


def _one_line(error: Exception) -> str:
    first, kind = first_line(error), type(error).__name__
    return kind if first == kind else f"{kind}: {first}"


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of memory reads: the best of a few sums over a buffer far larger than the caches.

    This limits decoding one token at a time, which reads every weight once.
    """
    buffer = torch.ones(BANDWIDTH_BYTES // 4, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(BANDWIDTH_TRIES + 1):
        began = time.perf_counter()
        float(buffer.sum())
        best = min(best, time.perf_counter() - began)
    return BANDWIDTH_BYTES / best
