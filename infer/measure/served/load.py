"""Asks servers the questions, a fixed number at a time, and times every streamed answer.

At each number of concurrent requests the servers take turns, in random order, with the same questions. A request that
fails is not sent again: it is counted, and its question is left out of the figures.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from draftsmith.infer.answers.server_client import Server, StreamedAnswer
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.measure.runners import Question, check_questions
from draftsmith.infer.measure.served.counters import DraftCounts, ServerCounters
from draftsmith.infer.text.record import Message

# Enough to see whether a server streams and counts tokens.
PROBE_TOKENS = 4


@dataclass(slots=True)
class ServedAnswer:
    """One server's answer to one question, once. With `error` there are no turns."""

    turns: list[StreamedAnswer] = field(default_factory=list)
    error: str = ""

    @property
    def tokens(self) -> int:
        return sum(turn.tokens for turn in self.turns)

    @property
    def seconds(self) -> float:
        return sum(turn.last_s for turn in self.turns)


@dataclass(slots=True)
class ServedLevel:
    """One server with `concurrency` requests at a time: answers by question, one per repeat."""

    concurrency: int
    answers: dict[int | str, list[ServedAnswer]]
    wall_s: float = 0.0
    counts: DraftCounts = field(default_factory=DraftCounts)


@dataclass(frozen=True, slots=True)
class ServedLoad:
    """levels[server's name]: one per number of concurrent requests, in order."""

    questions: list[Question]
    repeats: int
    seed: int
    levels: dict[str, list[ServedLevel]]

    def all_failed(self) -> str:
        """The first error if no request was answered, else ''."""
        found = [
            one.error
            for levels in self.levels.values()
            for level in levels
            for several in level.answers.values()
            for one in several
        ]
        return found[0] if all(found) else ""


def find_model(server: Server, asked: str) -> str:
    """The model to ask for: `asked`, or the first that the server lists."""
    names = server.models()
    if asked and asked not in names:
        raise ValueError(f"{server.root} serves no model {asked!r}, but {', '.join(names)}: see --model")
    return asked or names[0]


def probe(server: Server, settings: Settings) -> None:
    """A short request: raises if the server does not stream, or does not count the tokens of a stream."""
    server.stream([Message("user", "Hello")], settings, PROBE_TOKENS)


def measure(
    servers: Mapping[str, Server],
    questions: Sequence[Question],
    settings: Settings,
    max_new_tokens: int,
    *,
    concurrency: Sequence[int],
    repeats: int = 1,
    warmup: int = 1,
    progress: Callable[[str, bool], None] | None = None,
) -> ServedLoad:
    """Ask every server all questions at every number of concurrent requests, `repeats` times.

    Before a number's first load, each server answers `warmup` times as many requests that are not counted.
    """
    check(questions, concurrency)
    order = random.Random(settings.seed)
    levels = {
        name: [ServedLevel(many, {question.id: [] for question in questions}) for many in concurrency]
        for name in servers
    }
    counter = _LoadProgress(repeats * len(concurrency) * len(servers) * len(questions), progress)
    for repeat in range(repeats):
        for at, many in enumerate(concurrency):
            for name in order.sample(list(servers), len(servers)):
                server, level = servers[name], levels[name][at]
                if repeat == 0 and warmup:
                    _ask_all(server, _warm_up(questions, warmup * many), many, settings, max_new_tokens)
                before = ServerCounters.read(server.metrics())
                began = time.perf_counter()
                answers = _ask_all(server, questions, many, settings, max_new_tokens, counter.of(name, many))
                level.wall_s += time.perf_counter() - began
                level.counts += before.until(ServerCounters.read(server.metrics()))
                for question, answer in zip(questions, answers):
                    level.answers[question.id].append(answer)
    return ServedLoad(list(questions), repeats, settings.seed, levels)


def check(questions: Sequence[Question], concurrency: Sequence[int]) -> None:
    check_questions(questions)
    if not concurrency:
        raise ValueError("--concurrency names no number of requests: give some, such as 1,4,16")
    if len(set(concurrency)) < len(concurrency):
        raise ValueError("--concurrency names a number twice")
    if max(concurrency) > len(questions):
        raise ValueError(
            f"--concurrency {max(concurrency)} needs as many questions, and --data holds {len(questions)}: give more "
            "questions, or a smaller number"
        )


def _warm_up(questions: Sequence[Question], count: int) -> list[Question]:
    """Other prompts than those measured, so that no server finds those in its cache."""
    made = []
    for number in range(count):
        one = questions[number % len(questions)]
        made.append(Question(one.id, one.category, (f"Warm-up {number}. {one.turns[0]}",), one.system))
    return made


def _ask_all(
    server: Server,
    questions: Sequence[Question],
    concurrency: int,
    settings: Settings,
    max_new_tokens: int,
    done: Callable[[ServedAnswer], None] = lambda answer: None,
) -> list[ServedAnswer]:
    """The answers in the order of the questions; the next question is asked as soon as one is answered."""
    with ThreadPoolExecutor(concurrency) as pool:
        try:
            asked = [pool.submit(_answer, server, question, settings, max_new_tokens) for question in questions]
            waiting = set(asked)
            while waiting:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    done(future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in asked]


def _answer(server: Server, question: Question, settings: Settings, max_new_tokens: int) -> ServedAnswer:
    messages = [Message("system", question.system)] if question.system else []
    answer = ServedAnswer()
    for text in question.turns:
        messages.append(Message("user", text))
        try:
            turn = server.stream(messages, settings, max_new_tokens)
        except ValueError as problem:
            return ServedAnswer(error=" ".join(str(problem).split()))
        answer.turns.append(turn)
        messages.append(Message("assistant", turn.text))
    return answer


class _LoadProgress:
    """Questions answered, and the speed of the load that runs, on one line."""

    def __init__(self, total: int, show: Callable[[str, bool], None] | None) -> None:
        self.total = total
        self.show = show
        self.done = 0

    def of(self, name: str, concurrency: int) -> Callable[[ServedAnswer], None]:
        began, tokens = time.perf_counter(), 0

        def one_more(answer: ServedAnswer) -> None:
            nonlocal tokens
            tokens += answer.tokens
            self.done += 1
            if self.show is not None:
                speed = tokens / (time.perf_counter() - began)
                line = f"{self.done}/{self.total} questions, {name}, {concurrency} at a time: {speed:.1f} tokens/s"
                self.show(line, self.done == self.total)

        return one_more
