"""Exact enumeration: run a random procedure once for every outcome of its choices, and add up the weights.

Every draw and every comparison with a uniform is a choice of known probabilities, so the distribution of what comes out
is a finite sum and not an estimate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from typing import Any

import torch

from draftsmith.infer.contract.draft import ROOT, Draft


class Chooser:
    """Replays a script of choices and remembers which others there were."""

    def __init__(self) -> None:
        self.script: list[int] = []
        self.sizes: list[int] = []
        self.weight = 1.0
        self._at = 0

    def restart(self) -> None:
        self.weight, self._at = 1.0, 0

    def choose(self, probs: list[float]) -> int:
        """One of the options that have any weight."""
        able = [i for i, prob in enumerate(probs) if prob > 1e-15]
        if self._at == len(self.script):
            self.script.append(0)
            self.sizes.append(len(able))
        picked = able[self.script[self._at]]
        self._at += 1
        self.weight *= probs[picked] / sum(probs)
        return picked

    def advance(self) -> bool:
        """Go to the next script; False after the last one."""
        del self.script[self._at :], self.sizes[self._at :]
        while self.script and self.script[-1] + 1 == self.sizes[-1]:
            self.script.pop()
            self.sizes.pop()
        if not self.script:
            return False
        self.script[-1] += 1
        return True

    def draw(self, probs_V: torch.Tensor) -> int:
        return self.choose(probs_V.tolist())


def draw_by_inversion(probs_V: torch.Tensor, uniform: Any) -> int:
    """Stands for the product's: `uniform` is branched upon."""
    return int(uniform.draw(probs_V))


class Uniform:
    """A uniform number that is not drawn but branched upon when it is compared."""

    def __init__(self, chooser: Chooser, scale: float = 1.0) -> None:
        self.chooser, self.scale = chooser, scale

    def __mul__(self, factor: float) -> Uniform:
        return Uniform(self.chooser, self.scale * factor)

    __rmul__ = __mul__

    def __lt__(self, level: float) -> bool:
        share = min(max(level / self.scale, 0.0), 1.0)
        return self.chooser.choose([share, 1.0 - share]) == 0

    def draw(self, probs_V: torch.Tensor) -> int:
        return self.chooser.draw(probs_V)


class BranchingStream:
    """Stands for a row's stream in a single step, where every number is read once."""

    def __init__(self, chooser: Chooser) -> None:
        self.chooser = chooser

    def uniform(self, depth: int, purpose: str, index: int = 0) -> Uniform:
        return Uniform(self.chooser)

    def step_uniform(self, purpose: str, index: int = 0) -> Uniform:
        return Uniform(self.chooser)


class KeyedNumbers:
    """Uniform numbers by key: each is an interval, which comparisons and draws split. Read again, it is what is left.

    So a number that comes back in a later step is correlated with what it decided before, as in the product.
    """

    def __init__(self, chooser: Chooser) -> None:
        self.chooser = chooser
        self.ranges: dict[tuple[Any, ...], tuple[float, float]] = {}

    def split(self, key: tuple[Any, ...], edges: list[float]) -> int:
        """Choose one of the parts between the ascending `edges`, which cover [0, 1), and narrow the number to it."""
        low, high = self.ranges.get(key, (0.0, 1.0))
        parts = [(max(a, low), min(b, high)) for a, b in pairwise(edges)]
        picked = self.chooser.choose([max(b - a, 0.0) / (high - low) for a, b in parts])
        self.ranges[key] = parts[picked]
        return picked


class KeyedUniform:
    """The number of one key."""

    def __init__(self, numbers: KeyedNumbers, key: tuple[Any, ...], scale: float = 1.0) -> None:
        self.numbers, self.key, self.scale = numbers, key, scale

    def __mul__(self, factor: float) -> KeyedUniform:
        return KeyedUniform(self.numbers, self.key, self.scale * factor)

    __rmul__ = __mul__

    def __lt__(self, level: float) -> bool:
        return self.numbers.split(self.key, [0.0, min(max(level / self.scale, 0.0), 1.0), 1.0]) == 0

    def draw(self, probs_V: torch.Tensor) -> int:
        cumulated = torch.cumsum(probs_V, 0, dtype=torch.float64)
        return self.numbers.split(self.key, [0.0, *(cumulated / cumulated[-1]).tolist()])


class KeyedStream:
    """Stands for a row's stream at the step that starts at `start`, with the product's keys."""

    def __init__(self, numbers: KeyedNumbers, start: int) -> None:
        self.numbers, self.start = numbers, start

    def uniform(self, depth: int, purpose: str, index: int = 0) -> KeyedUniform:
        return KeyedUniform(self.numbers, (self.start + depth, purpose, index))

    def step_uniform(self, purpose: str, index: int = 0) -> KeyedUniform:
        return KeyedUniform(self.numbers, (self.start, "step", purpose, index))


def raced(numbers: KeyedNumbers, position: int) -> KeyedUniform:
    """What the target's own draw at a position reads: one outcome of a race whose noise belongs to the position."""
    return KeyedUniform(numbers, (position, "race"))


class KeyedDraws:
    """What a draft is drawn with, one number after the other: a chooser for proposers, keyed by the step's start."""

    def __init__(self, numbers: KeyedNumbers, start: int) -> None:
        self.numbers, self.start, self.count = numbers, start, 0

    def draw(self, probs_V: torch.Tensor) -> int:
        self.count += 1
        return KeyedUniform(self.numbers, (self.start, "draft", self.count)).draw(probs_V)


class TableDistribution:
    """A distribution that is a function of the path, over a tiny vocabulary. `race`: depth -> what the target's own
    token there is drawn with, if it has a key."""

    greedy = False

    def __init__(
        self,
        draft: Draft,
        distribution_of: Callable[[tuple[int, ...]], list[float]],
        chooser: Chooser,
        race: Callable[[int], KeyedUniform] | None = None,
    ) -> None:
        self.draft, self.distribution_of = draft, distribution_of
        self.race = race or (lambda depth: chooser)
        self.vocab_size = len(distribution_of(()))

    def probs(self, node: int) -> torch.Tensor:
        return torch.tensor(self.distribution_of(path_of(self.draft, node)), dtype=torch.float64)

    def choice(self, node: int) -> int:
        raise AssertionError("a distribution with temperature has no choice")

    def draw(self, node: int) -> int:
        return self.race(len(path_of(self.draft, node))).draw(self.probs(node))


def path_of(draft: Draft, node: int) -> tuple[int, ...]:
    path: list[int] = []
    while node != ROOT:
        path.append(draft.tokens[node])
        node = draft.parents[node]
    return tuple(path[::-1])


def enumerate_outcomes(procedure: Callable[[Chooser], Hashable]) -> dict[Any, float]:
    """The distribution of what `procedure` returns."""
    chooser, distribution = Chooser(), defaultdict(float)
    while True:
        chooser.restart()
        outcome = procedure(chooser)
        distribution[outcome] += chooser.weight
        if not chooser.advance():
            return dict(distribution)


def emitted_distribution(
    propose: Callable[[Chooser], Draft],
    rule: Callable[..., Any],
    distribution_of: Callable[[tuple[int, ...]], list[float]],
    length: int,
) -> dict[tuple[int, ...], float]:
    """The distribution of the first `length` tokens when a step is followed by plain sampling."""

    def procedure(chooser: Chooser) -> tuple[int, ...]:
        draft = propose(chooser)
        verdict = rule(draft, TableDistribution(draft, distribution_of, chooser), BranchingStream(chooser))
        return (*(draft.tokens[node] for node in verdict.path), verdict.next_token)

    return completed(enumerate_outcomes(procedure), distribution_of, length)


def completed(
    emitted: dict[tuple[int, ...], float], distribution_of: Callable[[tuple[int, ...]], list[float]], length: int
) -> dict[tuple[int, ...], float]:
    """The distribution of the first `length` tokens when plain sampling goes on behind what was emitted."""
    found: dict[tuple[int, ...], float] = defaultdict(float)
    for tokens, weight in emitted.items():
        behind = plain_distribution(lambda path, tokens=tokens: distribution_of(tokens + path), length - len(tokens))
        for path, prob in behind.items():
            found[(tokens + path)[:length]] += weight * prob
    return dict(found)


def after_steps(
    proposals: Sequence[Callable[[KeyedDraws], Draft]],
    rule: Callable[..., Any],
    distribution_of: Callable[[tuple[int, ...]], list[float]],
    length: int,
) -> dict[tuple[int, ...], float]:
    """The distribution of the first `length` tokens when the steps of these proposals are followed by plain sampling.

    Numbers are keyed as in the product, so what a step has read may come back in the next.
    """

    def procedure(chooser: Chooser) -> tuple[int, ...]:
        numbers, tokens = KeyedNumbers(chooser), tuple[int, ...]()
        for propose in proposals:
            draft, before = propose(KeyedDraws(numbers, len(tokens))), tokens
            distribution = TableDistribution(
                draft,
                lambda path, before=before: distribution_of(before + path),
                chooser,
                lambda depth, before=before: raced(numbers, len(before) + depth),
            )
            verdict = rule(draft, distribution, KeyedStream(numbers, len(tokens)))
            tokens += (*(draft.tokens[node] for node in verdict.path), verdict.next_token)
        while len(tokens) < length:
            law = torch.tensor(distribution_of(tokens), dtype=torch.float64)
            tokens += (raced(numbers, len(tokens)).draw(law),)
        return tokens[:length]

    return enumerate_outcomes(procedure)


def expected_accepted(
    propose: Callable[[Chooser], Draft],
    rule: Callable[..., Any],
    distribution_of: Callable[[tuple[int, ...]], list[float]],
) -> float:
    """The mean number of drafted tokens that a step accepts."""

    def procedure(chooser: Chooser) -> int:
        draft = propose(chooser)
        distribution = TableDistribution(draft, distribution_of, chooser)
        return len(rule(draft, distribution, BranchingStream(chooser)).path)

    return sum(accepted * weight for accepted, weight in enumerate_outcomes(procedure).items())


def plain_distribution(
    distribution_of: Callable[[tuple[int, ...]], list[float]], length: int
) -> dict[tuple[int, ...], float]:
    """The distribution of the first `length` tokens of plain sampling."""
    distribution = {(): 1.0}
    for _ in range(length):
        distribution = {
            (*p, t): w * q for p, w in distribution.items() for t, q in enumerate(distribution_of(p)) if q > 0
        }
    return distribution


def distance(one: dict[Any, float], other: dict[Any, float]) -> float:
    """Total variation."""
    return 0.5 * sum(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in {*one, *other})
