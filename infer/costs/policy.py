"""What a token is worth in seconds, and from that how much it pays to draft and to verify.

A decoder that commits n tokens in s seconds over many steps makes the most of its time if each next piece of work is
done exactly when what it is expected to add, in tokens, times the seconds that a token costs now, is more than the
seconds that the work takes: the renewal-reward argument, with the rate estimated as it goes. Seconds are those that
were measured once (infer/costs/pass_costs.py), never the clock's, so that the same rows are drafted for in the same way
again.

Work is of three kinds: another pass of the draft over more nodes, a deeper block of it for some of them
(infer/drafters/exit_choice.py), and another node to verify. A padded pass costs by its longest row, so all rows of a
step share one width. This module does not know models, trees or distributions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from draftsmith.infer.costs.pass_costs import Costs

# Of the running means: how much of the past a step keeps. A mean over some fifty steps follows a text that changes.
KEPT = 0.98
# What is believed before the first step: steps of plain decoding, and how often one of a node's children is right.
PRIOR_STEPS = 8.0
PRIOR_COVERAGE = 0.6
TOWARDS_PRIOR = 0.05


@dataclass(frozen=True, slots=True)
class PlannedPass:
    """A pass that could be made: so many rows, the tokens of the longest."""

    rows: int
    tokens: int


class Policy:
    """One drafter's accounts with one target. `entry` names the pass that every new node of the draft goes through;
    None where drafting costs nothing worth counting."""

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
        """A step of rows with these contexts begins."""
        self._rows = max(len(contexts), 1)
        self._context = max(contexts, default=0)
        self._spent = self._entered = 0.0

    @property
    def seconds_per_token(self) -> float:
        """Seconds per token, as things go."""
        prior = self._step_seconds(0)
        return (self._seconds + PRIOR_STEPS * prior) / (self._tokens + PRIOR_STEPS * self._rows)

    @property
    def coverage(self) -> float:
        """How often one of the verified children of an expanded node is right."""
        return self._coverage

    def seconds(self, name: str, work: PlannedPass) -> float:
        """What a pass of the draft costs."""
        return self.costs.of(name)(work.rows, work.tokens, self._context)

    def charge(self, seconds: float, entering: bool = True) -> None:
        """A pass is made; `entering`: the one that every new node goes through, others only take some deeper."""
        self._spent += seconds
        self._entered += seconds if entering else 0.0

    def settle(self, nodes: int, committed: int) -> None:
        """The step verified up to `nodes` nodes in a row, and its rows keep `committed` tokens together."""
        self._seconds = KEPT * self._seconds + self._spent + self._step_seconds(nodes)
        self._tokens = KEPT * self._tokens + committed
        if self._entered:
            self._deepening = KEPT * self._deepening + (1 - KEPT) * self._spent / self._entered

    def covered(self, share: float | None) -> None:
        """What share of the acceptance the kept children of the expanded nodes promise; None: none was expanded, and
        the belief returns slowly to where it began, so that drafting is tried again."""
        keep, seen = (KEPT, share) if share is not None else (1 - TOWARDS_PRIOR, PRIOR_COVERAGE)
        self._coverage = keep * self._coverage + (1 - keep) * seen

    # decisions

    def expand(self, offers: Sequence[tuple[float, int]], pending: Sequence[int]) -> int:
        """How many of the offers, (worth, row), best first, to run through the draft: those that promise more than the
        pass takes, with what deeper passes have come to take beside it. `pending[row]` tokens have to go through with
        a row's first."""
        best, chosen, seconds_per_token = 0.0, 0, self.seconds_per_token
        tokens: dict[int, int] = {}
        promised = 0.0
        longest = 0
        for count, (worth, row) in enumerate(offers, start=1):
            tokens[row] = tokens.get(row, pending[row]) + 1
            longest = max(longest, tokens[row])
            promised += worth
            cost = 0.0 if self._entry is None else self._entry(len(tokens), longest, self._context) * self._deepening
            net = promised * self._coverage * seconds_per_token - cost
            if net > best:
                best, chosen = net, count
        return chosen

    def width(self, worths: Sequence[Sequence[float]]) -> int:
        """How many nodes a row may have, given each row's worths in falling order: the best for all rows together."""
        longest = max((len(row) for row in worths), default=0)
        seconds_per_token, promised = self.seconds_per_token, 0.0
        best, chosen = -self._step_seconds(0), 0
        for nodes in range(1, longest + 1):
            promised += sum(row[nodes - 1] for row in worths if len(row) >= nodes)
            net = promised * seconds_per_token - self._step_seconds(nodes)
            if net > best:
                best, chosen = net, nodes
        return chosen

    def next_node(self, nodes: int) -> float:
        """Seconds that one more node in each row would take to verify."""
        return self._step_seconds(nodes + 1) - self._step_seconds(nodes)

    def _step_seconds(self, nodes: int) -> float:
        return self._target(self._rows, 1 + nodes, self._context) + self.costs.overhead
