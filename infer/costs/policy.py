"""The policy: how much to draft and to verify, from expected gain and measured seconds.

A decoder makes the most of its time if it does a piece of work exactly when its expected gain in tokens, times the
current seconds per token, exceeds the seconds that it takes: the renewal-reward argument, with the rate estimated as it
goes. Seconds come from measured costs (infer/costs/pass_costs.py), never from the clock, so decisions are reproducible.

Three kinds of work are weighed: one more pass of the draft over more nodes, a deeper block for some of them
(infer/drafters/exit_choice.py), and one more node to verify. A padded pass costs as much as its longest row, so all
rows of a step get the same width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from draftsmith.infer.costs.pass_costs import Costs

# Decay of the running means per step: they span about fifty steps, so they follow a text that changes.
KEPT = 0.98
# Before the first step: this many steps of plain decoding, and the share of expanded nodes with a right child.
PRIOR_STEPS = 8.0
PRIOR_COVERAGE = 0.6
# How fast the coverage returns to its prior while nothing is expanded.
TOWARDS_PRIOR = 0.05


@dataclass(frozen=True, slots=True)
class PlannedPass:
    """A pass that could be made: its number of rows, and the tokens of the longest."""

    rows: int
    tokens: int


class Policy:
    """The policy of one drafter with one target. `entry`: the name of the pass that every new node of the draft goes
    through; None if drafting is free."""

    def __init__(self, costs: Costs, entry: str | None) -> None:
        self.costs = costs
        self._target = costs.of("target")
        self._entry = None if entry is None else costs.of(entry)
        self._rows = 1
        self._context = 0.0
        self._spent = 0.0
        self._seconds = 0.0
        self._tokens = 0.0
        self._coverage = PRIOR_COVERAGE
        self._entered = 0.0
        self._deepening = 1.0

    # one step, from begin to settle

    def begin(self, contexts: Sequence[int]) -> None:
        """Start a step of rows with these context lengths."""
        self._rows = max(len(contexts), 1)
        self._context = max(contexts, default=0)
        self._spent = self._entered = 0.0

    @property
    def seconds_per_token(self) -> float:
        """The current estimate of seconds per committed token."""
        prior = self._step_seconds(0)
        return (self._seconds + PRIOR_STEPS * prior) / (self._tokens + PRIOR_STEPS * self._rows)

    @property
    def coverage(self) -> float:
        """The share of expanded nodes with a right child among those verified."""
        return self._coverage

    def seconds(self, name: str, planned: PlannedPass) -> float:
        """The cost of a draft pass."""
        return self.costs.of(name)(planned.rows, planned.tokens, self._context)

    def charge(self, seconds: float, entering: bool = True) -> None:
        """Account for a draft pass. `entering`: it is the one that every new node goes through, not a deeper block."""
        self._spent += seconds
        self._entered += seconds if entering else 0.0

    def settle(self, nodes: int, committed: int) -> None:
        """End the step: the widest row verified `nodes` nodes, and all rows together committed `committed` tokens."""
        self._seconds = KEPT * self._seconds + self._spent + self._step_seconds(nodes)
        self._tokens = KEPT * self._tokens + committed
        if self._entered:
            self._deepening = KEPT * self._deepening + (1 - KEPT) * self._spent / self._entered

    def covered(self, share: float | None) -> None:
        """Update the coverage with the share observed. None (no node was expanded) moves it back towards its prior, so
        that drafting is tried again."""
        keep, seen = (KEPT, share) if share is not None else (1 - TOWARDS_PRIOR, PRIOR_COVERAGE)
        self._coverage = keep * self._coverage + (1 - keep) * seen

    # decisions

    def expand(self, offers: Sequence[tuple[float, int]], pending: Sequence[int]) -> int:
        """How many of the offers (gain, row), best first, to run through the draft: the number with the best net gain.

        `pending[row]` tokens have to go through the draft before a row's first offer. The cost of the pass includes
        its share of deeper passes, as observed."""
        best, chosen, seconds_per_token = 0.0, 0, self.seconds_per_token
        tokens: dict[int, int] = {}
        gained = 0.0
        longest = 0
        for count, (gain, row) in enumerate(offers, start=1):
            tokens[row] = tokens.get(row, pending[row]) + 1
            longest = max(longest, tokens[row])
            gained += gain
            cost = 0.0 if self._entry is None else self._entry(len(tokens), longest, self._context) * self._deepening
            net = gained * self._coverage * seconds_per_token - cost
            if net > best:
                best, chosen = net, count
        return chosen

    def width(self, gains: Sequence[Sequence[float]]) -> int:
        """The best number of nodes per row for all rows together, given each row's gains in descending order."""
        longest = max((len(row) for row in gains), default=0)
        seconds_per_token, gained = self.seconds_per_token, 0.0
        best, chosen = -self._step_seconds(0), 0
        for nodes in range(1, longest + 1):
            gained += sum(row[nodes - 1] for row in gains if len(row) >= nodes)
            net = gained * seconds_per_token - self._step_seconds(nodes)
            if net > best:
                best, chosen = net, nodes
        return chosen

    def next_node(self, nodes: int) -> float:
        """Seconds to verify one more node in each row."""
        return self._step_seconds(nodes + 1) - self._step_seconds(nodes)

    def _step_seconds(self, nodes: int) -> float:
        return self._target(self._rows, 1 + nodes, self._context) + self.costs.overhead
