"""How deep to run a sorted draft for each node: rules that choose an exit.

A rule sees the distributions at an exit before anything is drawn from them, and decides which nodes continue to the
next one. A node's tokens come from its last exit, in one draw, so no rule can bias the output.

`Threshold` and `LevelThreshold` are the rules of S2D (arXiv 2407.01955): exit where the likeliest token's probability
exceeds a threshold; for trees, as published, the most confident node of a level decides for all of it. `Cost` compares
the expected gain of a deeper exit with its time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from draftsmith.infer.costs.calibration import TOP, covered_key
from draftsmith.infer.costs.calibrator import Calibrator
from draftsmith.infer.costs.policy import PlannedPass, Policy

# Without a calibration: each further exit corrects this share of its predecessor's errors.
ASSUMED_GAIN = 0.1


@dataclass(frozen=True, slots=True)
class Fork:
    """A node at an exit: its row, its probability of being reached, its likeliest token's probability, and how many
    entries of its row must go through the next block with it."""

    row: int
    reach: float
    top: float
    missing: int


class ExitChoice(Protocol):
    """`blind`: the rule needs no distributions, so none are computed for a node that continues."""

    blind: bool

    def deepest(self, exits: Sequence[int]) -> int:
        """The most blocks that can be needed; ValueError if the rule does not fit the exits."""
        ...

    def may_go(self, at: int, reaches: Sequence[float]) -> bool:
        """Whether any node at exit number `at` could continue, whatever the distributions there."""
        ...

    def deeper(self, at: int, forks: Sequence[Fork]) -> list[bool]:
        """Which nodes at exit number `at` continue to the next."""
        ...


class Fixed:
    """Every node exits after `exit` layers."""

    blind = True

    def __init__(self, exit: int) -> None:
        self.exit = exit
        self._at = 0

    def deepest(self, exits: Sequence[int]) -> int:
        if self.exit not in exits:
            raise ValueError(f"exit {self.exit} is none of this draft's exits {list(exits)}")
        self._at = list(exits).index(self.exit)
        return self._at + 1

    def may_go(self, at: int, reaches: Sequence[float]) -> bool:
        return at < self._at

    def deeper(self, at: int, forks: Sequence[Fork]) -> list[bool]:
        return [at < self._at] * len(forks)


class Threshold:
    """A node exits where its likeliest token's probability exceeds `values[exit number]`."""

    blind = False

    def __init__(self, values: Sequence[float]) -> None:
        self.values = list(values)

    def deepest(self, exits: Sequence[int]) -> int:
        if len(self.values) != len(exits):
            raise ValueError(f"{len(self.values)} thresholds for {len(exits)} exits: give one for each")
        return len(exits)

    def may_go(self, at: int, reaches: Sequence[float]) -> bool:
        return True

    def deeper(self, at: int, forks: Sequence[Fork]) -> list[bool]:
        return [fork.top <= self.values[at] for fork in forks]


class LevelThreshold(Threshold):
    """The published rule for trees: the most confident node of a row's level decides for all of them."""

    def deeper(self, at: int, forks: Sequence[Fork]) -> list[bool]:
        highest: dict[int, float] = {}
        for fork in forks:
            highest[fork.row] = max(highest.get(fork.row, 0.0), fork.top)
        return [highest[fork.row] <= self.values[at] for fork in forks]


class Cost:
    """A node goes deeper where that is expected to add more tokens than the time could yield otherwise.

    The gain comes from the calibration: given the likeliest token's probability here, how often the target's token is
    among the first `top` here and at each deeper exit. The cost is the blocks' passes up to there, shared by the nodes
    that go, over all entries that those blocks have skipped. Each deeper exit is tried with the nodes of largest gain.
    """

    blind = False

    def __init__(self, top: int) -> None:
        self.top = max(one for one in TOP if one <= max(top, 1))
        self.policy: Policy | None = None
        self.names: Sequence[str] = ()
        self._curves: dict[tuple[int, int], Calibrator | None] = {}
        self._bounds: dict[tuple[int, int], float] = {}

    def bind(
        self, policy: Policy, names: Sequence[str], exits: Sequence[int], covered: Mapping[str, Calibrator]
    ) -> None:
        """Take the policy, the names of the blocks' passes, and the calibration's curves between exits."""
        self.policy, self.names, self._bounds = policy, names, {}
        self._curves = {
            (e, d): covered.get(covered_key(exits[e], exits[d], self.top))
            for e in range(len(exits))
            for d in range(e, len(exits))
        }

    def deepest(self, exits: Sequence[int]) -> int:
        return len(exits)

    def may_go(self, at: int, reaches: Sequence[float]) -> bool:
        """Compares the largest possible gain with the least cost: one row, one token."""
        assert self.policy is not None, "bind() must come first"
        value, cost = sum(reaches) * self.policy.seconds_per_token, 0.0
        for deeper in range(at + 1, len(self.names)):
            cost += self.policy.seconds(self.names[deeper], PlannedPass(1, 1))
            if value * self._most(at, deeper) > cost:
                return True
        return False

    def deeper(self, at: int, forks: Sequence[Fork]) -> list[bool]:
        assert self.policy is not None, "bind() must come first"
        best, chosen = 0.0, [False] * len(forks)
        for deeper in range(at + 1, len(self.names)):
            gains = [(fork.reach * self._gain(at, deeper, fork.top), i) for i, fork in enumerate(forks)]
            gains.sort(key=lambda one: (-one[0], one[1]))
            promised, tokens = 0.0, dict[int, int]()
            for count, (gain, i) in enumerate(gains, start=1):
                fork = forks[i]
                promised += gain
                tokens[fork.row] = max(tokens.get(fork.row, 0) + 1, fork.missing)
                work = PlannedPass(len(tokens), max(tokens.values()))
                cost = sum(self.policy.seconds(self.names[block], work) for block in range(at + 1, deeper + 1))
                net = promised * self.policy.seconds_per_token - cost
                if net > best:
                    best = net
                    chosen = [False] * len(forks)
                    for _, taken in gains[:count]:
                        chosen[taken] = True
        return chosen

    def _most(self, at: int, deeper: int) -> float:
        """The largest gain at any confidence: curves are straight between their points."""
        if (at, deeper) not in self._bounds:
            here, there = self._curves[at, deeper], self._curves[at, at]
            corners = {0.0, 1.0, *(here.raw if here else ()), *(there.raw if there else ())}
            self._bounds[at, deeper] = max(self._gain(at, deeper, top) for top in corners)
        return self._bounds[at, deeper]

    def _gain(self, at: int, deeper: int, top: float) -> float:
        """How much more often one of the first tokens is right at a deeper exit, if `top` is this exit's confidence."""
        here, there = self._curves[at, at], self._curves[at, deeper]
        if here is None or there is None:
            return (1 - top) * (1 - (1 - ASSUMED_GAIN) ** (deeper - at))
        return max(there(top) - here(top), 0.0)
