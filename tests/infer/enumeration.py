"""Exact enumeration: run a random procedure once for every outcome of its choices, and add up the weights.

Every draw and every comparison with a uniform is a choice of known probabilities, so the distribution of what comes out
is a finite sum and not an estimate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
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

    def draw(self, probs_V: torch.Tensor, uniform: Any = None) -> int:
        """Stands for draw_by_inversion."""
        return self.choose(probs_V.tolist())


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


class BranchingStream:
    """Stands for a row's stream."""

    def __init__(self, chooser: Chooser) -> None:
        self.chooser = chooser

    def uniform(self, depth: int, purpose: str, index: int = 0) -> Uniform:
        return Uniform(self.chooser)


class TableDistribution:
    """A distribution that is a function of the path, over a tiny vocabulary."""

    greedy = False

    def __init__(
        self, draft: Draft, distribution_of: Callable[[tuple[int, ...]], list[float]], chooser: Chooser
    ) -> None:
        self.draft, self.distribution_of, self.chooser = draft, distribution_of, chooser
        self.vocab_size = len(distribution_of(()))

    def probs(self, node: int) -> torch.Tensor:
        return torch.tensor(self.distribution_of(path_of(self.draft, node)), dtype=torch.float64)

    def choice(self, node: int) -> int:
        raise AssertionError("a distribution with temperature has no choice")

    def draw(self, node: int, uniform: Any) -> int:
        return self.chooser.draw(self.probs(node))


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
        tokens = [draft.tokens[node] for node in verdict.path] + [verdict.next_token]
        while len(tokens) < length:
            tokens.append(chooser.choose(distribution_of(tuple(tokens))))
        return tuple(tokens[:length])

    return enumerate_outcomes(procedure)


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
