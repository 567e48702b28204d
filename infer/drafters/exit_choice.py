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

from draftsmith.infer.contract.row import Row
from draftsmith.infer.costs.account import Account
from draftsmith.infer.costs.calibration import TOP, Calibration, covered_key
from draftsmith.infer.costs.calibrator import Calibrator
from draftsmith.infer.costs.policy import Policy

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


@dataclass(frozen=True, slots=True)
class Pricing:
    """The policy for the nodes of a draft's pass. `alone`: the rows draw their drafts, and each is decided for by its
    own account, as if it were alone. `coupled`: rows with a temperature get coupled candidates."""

    policy: Policy
    alone: bool = False
    coupled: bool = False

    def calibration(self, row: Row) -> Calibration | None:
        return self.policy.calibration(row, self.coupled)

    def groups(self, rows: Sequence[Row], forks: Sequence[Fork]) -> list[tuple[Account, list[int]]]:
        """The forks (by index) that are decided together, and the account that decides."""
        if not self.alone:
            return [(self.policy.joint, list(range(len(forks))))]
        own = sorted({fork.row for fork in forks})
        return [(self.policy.alone(rows[row]), [i for i, fork in enumerate(forks) if fork.row == row]) for row in own]


class ExitChoice(Protocol):
    """`blind`: the rule needs no distributions, so none are computed for a node that continues."""

    blind: bool

    def deepest(self, exits: Sequence[int]) -> int:
        """The most blocks that can be needed; ValueError if the rule does not fit the exits."""
        ...

    def may_go(self, at: int, rows: Sequence[Row], forks: Sequence[Fork], pricing: Pricing | None) -> bool:
        """Whether any node at exit number `at` could continue, whatever the distributions there: `top` is not set."""
        ...

    def deeper(self, at: int, rows: Sequence[Row], forks: Sequence[Fork], pricing: Pricing | None) -> list[bool]:
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

    def may_go(self, at: int, rows: Sequence[Row], forks: Sequence[Fork], pricing: Pricing | None) -> bool:
        return at < self._at

    def deeper(self, at: int, rows: Sequence[Row], forks: Sequence[Fork], pricing: Pricing | None) -> list[bool]:
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

    def may_go(self, at: int, rows: Sequence[Row], forks: Sequence[Fork], pricing: Pricing | None) -> bool:
        return True

    def deeper(self, at: int, rows: Sequence[Row], forks: Sequence[Fork], pricing: Pricing | None) -> list[bool]:
        return [fork.top <= self.values[at] for fork in forks]


class LevelThreshold(Threshold):
    """The published rule for trees: the most confident node of a row's level decides for all of them."""

    def deeper(self, at: int, rows: Sequence[Row], forks: Sequence[Fork], pricing: Pricing | None) -> list[bool]:
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
        self.names: Sequence[str] = ()
        self.exits: Sequence[int] = ()
        # Of each band's calibration, the largest gains at any confidence.
        self._bounds: dict[str, tuple[Calibration | None, dict[tuple[int, int], float]]] = {}

    def bind(self, names: Sequence[str], exits: Sequence[int]) -> None:
        """Take the names of the blocks' passes, and the exits after them."""
        self.names, self.exits = names, exits

    def deepest(self, exits: Sequence[int]) -> int:
        return len(exits)

    def may_go(self, at: int, rows: Sequence[Row], forks: Sequence[Fork], pricing: Pricing | None) -> bool:
        """Compares the largest possible gain with the least cost: one token."""
        assert pricing is not None, "the choice by cost needs costs"
        for account, together in pricing.groups(rows, forks):
            cost = 0.0
            for deeper in range(at + 1, len(self.names)):
                cost += account.least_seconds(self.names[deeper])
                gain = sum(
                    forks[i].reach * self._most(at, deeper, self._known(rows, forks[i], pricing)) for i in together
                )
                if gain * account.seconds_per_token > cost:
                    return True
        return False

    def deeper(self, at: int, rows: Sequence[Row], forks: Sequence[Fork], pricing: Pricing | None) -> list[bool]:
        assert pricing is not None, "the choice by cost needs costs"
        chosen = [False] * len(forks)
        for account, together in pricing.groups(rows, forks):
            for i in self._worth(at, rows, {i: forks[i] for i in together}, account, pricing):
                chosen[i] = True
        return chosen

    def _worth(
        self, at: int, rows: Sequence[Row], forks: Mapping[int, Fork], account: Account, pricing: Pricing
    ) -> list[int]:
        best, chosen, worth = 0.0, list[int](), account.seconds_per_token
        for deeper in range(at + 1, len(self.names)):
            gains = [
                (fork.reach * self._gain(at, deeper, fork.top, self._known(rows, fork, pricing)), i)
                for i, fork in forks.items()
            ]
            gains.sort(key=lambda one: (-one[0], one[1]))
            promised, tokens = 0.0, dict[Row, int]()
            for count, (gain, i) in enumerate(gains, start=1):
                row = rows[forks[i].row]
                promised += gain
                tokens[row] = max(tokens.get(row, 0) + 1, forks[i].missing)
                cost = sum(account.seconds(self.names[block], tokens) for block in range(at + 1, deeper + 1))
                if promised * worth - cost > best:
                    best = promised * worth - cost
                    chosen = [taken for _, taken in gains[:count]]
        return chosen

    def _known(self, rows: Sequence[Row], fork: Fork, pricing: Pricing) -> Calibration | None:
        return pricing.calibration(rows[fork.row])

    def _most(self, at: int, deeper: int, known: Calibration | None) -> float:
        """The largest gain at any confidence: curves are straight between their points."""
        band = "" if known is None else known.band
        if band not in self._bounds or self._bounds[band][0] is not known:
            self._bounds[band] = (known, {})
        bounds = self._bounds[band][1]
        if (at, deeper) not in bounds:
            here, there = self._curve(at, deeper, known), self._curve(at, at, known)
            corners = {0.0, 1.0, *(here.raw if here else ()), *(there.raw if there else ())}
            bounds[at, deeper] = max(self._gain(at, deeper, top, known) for top in corners)
        return bounds[at, deeper]

    def _gain(self, at: int, deeper: int, top: float, known: Calibration | None) -> float:
        """How much more often one of the first tokens is right at a deeper exit, if `top` is this exit's confidence."""
        here, there = self._curve(at, at, known), self._curve(at, deeper, known)
        if here is None or there is None:
            return (1 - top) * (1 - (1 - ASSUMED_GAIN) ** (deeper - at))
        return max(there(top) - here(top), 0.0)

    def _curve(self, at: int, deeper: int, known: Calibration | None) -> Calibrator | None:
        if known is None:
            return None
        return known.covered.get(covered_key(self.exits[at], self.exits[deeper], self.top))
