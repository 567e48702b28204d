"""How deep to run a sorted draft for each node: the rules that choose an exit.

A rule looks at the distributions at an exit before anything is drawn from them, and says which nodes go on to the next
one. What is drafted comes from the last exit that a node reached, in one draw. So no rule can bias the output, and they
can be exchanged at will.

`Threshold` and `LevelThreshold` are the rules of SD2 (arXiv 2407.01955): leave where the likeliest token has more than
so much probability; the published tree takes the highest of a whole level, and one confident node takes all others out
with it. `Cost` weighs what going deeper adds against what it takes.

This module does not know models; a fork is all that a rule sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from draftsmith.infer.costs.calibration import TOP, covered_key
from draftsmith.infer.costs.calibrator import Calibrator
from draftsmith.infer.costs.policy import PlannedPass, Policy

# Without a calibration: each further exit is taken to mend this share of what its predecessor gets wrong.
ASSUMED_GAIN = 0.1


@dataclass(frozen=True, slots=True)
class Fork:
    """A node at an exit: its row, the probability of being reached, that of its likeliest token, and how many entries
    its row would have to send through the next block for it."""

    row: int
    worth: float
    top: float
    missing: int


class ExitChoice(Protocol):
    """`blind`: the rule does not look at the distributions, and none need be made for a node that goes on."""

    blind: bool

    def deepest(self, exits: Sequence[int]) -> int:
        """How many blocks can be needed at all; ValueError where the rule does not fit the exits."""
        ...

    def may_go(self, at: int, worths: Sequence[float]) -> bool:
        """Whether any of the nodes at exit number `at` could go on, whatever the distributions there say."""
        ...

    def deeper(self, at: int, forks: Sequence[Fork]) -> list[bool]:
        """Which nodes at exit number `at` go on to the next."""
        ...


class Fixed:
    """Every node leaves at `exit`, a number of layers."""

    blind = True

    def __init__(self, exit: int) -> None:
        self.exit = exit
        self._at = 0

    def deepest(self, exits: Sequence[int]) -> int:
        if self.exit not in exits:
            raise ValueError(f"exit {self.exit} is none of this draft's exits {list(exits)}")
        self._at = list(exits).index(self.exit)
        return self._at + 1

    def may_go(self, at: int, worths: Sequence[float]) -> bool:
        return at < self._at

    def deeper(self, at: int, forks: Sequence[Fork]) -> list[bool]:
        return [at < self._at] * len(forks)


class Threshold:
    """A node leaves where its likeliest token has more than `values[exit number]` of the probability."""

    blind = False

    def __init__(self, values: Sequence[float]) -> None:
        self.values = list(values)

    def deepest(self, exits: Sequence[int]) -> int:
        if len(self.values) != len(exits):
            raise ValueError(f"{len(self.values)} thresholds for {len(exits)} exits: give one for each")
        return len(exits)

    def may_go(self, at: int, worths: Sequence[float]) -> bool:
        return True

    def deeper(self, at: int, forks: Sequence[Fork]) -> list[bool]:
        return [fork.top <= self.values[at] for fork in forks]


class LevelThreshold(Threshold):
    """The published rule for trees: the surest node of a row's level decides for all of them."""

    def deeper(self, at: int, forks: Sequence[Fork]) -> list[bool]:
        surest: dict[int, float] = {}
        for fork in forks:
            surest[fork.row] = max(surest.get(fork.row, 0.0), fork.top)
        return [surest[fork.row] <= self.values[at] for fork in forks]


class Cost:
    """A node goes deeper where that is expected to add more tokens than its time could buy otherwise.

    What depth adds is known from the calibration: given the likeliest token's probability here, how often the target's
    token is among the first `top` here and at each deeper exit. What it takes is the pass of the blocks up to there,
    which the nodes that go share, over all that those blocks have missed. The best set is sought for every deeper
    exit, nodes with the most to gain first.
    """

    blind = False

    def __init__(self, top: int) -> None:
        self.top = max(one for one in TOP if one <= max(top, 1))
        self.policy: Policy | None = None
        self.names: Sequence[str] = ()
        self._curves: dict[tuple[int, int], Calibrator | None] = {}
        self._bounds: dict[tuple[int, int], float] = {}

    def know(
        self, policy: Policy, names: Sequence[str], exits: Sequence[int], covered: Mapping[str, Calibrator]
    ) -> None:
        """Take the accounts, the names of the blocks' passes, and what the calibration tells of the exits."""
        self.policy, self.names, self._bounds = policy, names, {}
        self._curves = {
            (e, d): covered.get(covered_key(exits[e], exits[d], self.top))
            for e in range(len(exits))
            for d in range(e, len(exits))
        }

    def deepest(self, exits: Sequence[int]) -> int:
        return len(exits)

    def may_go(self, at: int, worths: Sequence[float]) -> bool:
        """The most that depth has to give anywhere, against the least that it takes: one row, one token."""
        assert self.policy is not None, "the rule was not told what passes cost"
        worth, cost = sum(worths) * self.policy.seconds_per_token, 0.0
        for deeper in range(at + 1, len(self.names)):
            cost += self.policy.seconds(self.names[deeper], PlannedPass(1, 1))
            if worth * self._most(at, deeper) > cost:
                return True
        return False

    def deeper(self, at: int, forks: Sequence[Fork]) -> list[bool]:
        assert self.policy is not None, "the rule was not told what passes cost"
        best, chosen = 0.0, [False] * len(forks)
        for deeper in range(at + 1, len(self.names)):
            gains = [(fork.worth * self._gain(at, deeper, fork.top), i) for i, fork in enumerate(forks)]
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
        """The largest gain that any sureness could have: curves are straight between their points."""
        if (at, deeper) not in self._bounds:
            here, there = self._curves[at, deeper], self._curves[at, at]
            corners = {0.0, 1.0, *(here.raw if here else ()), *(there.raw if there else ())}
            self._bounds[at, deeper] = max(self._gain(at, deeper, top) for top in corners)
        return self._bounds[at, deeper]

    def _gain(self, at: int, deeper: int, top: float) -> float:
        """How much more often one of the first tokens is right at a deeper exit, where this one is so sure."""
        here, there = self._curves[at, at], self._curves[at, deeper]
        if here is None or there is None:
            return (1 - top) * (1 - (1 - ASSUMED_GAIN) ** (deeper - at))
        return max(there(top) - here(top), 0.0)
