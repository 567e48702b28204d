"""The running account of rows that are decided together: what a token takes at present, and which work is worth it.

A decoder makes the most of its time if it does a piece of work exactly when its expected gain in tokens, times the
current seconds per token, exceeds the seconds that it takes: the renewal-reward argument, with the rate estimated as it
goes, and never above that of plain decoding, which is always open. Seconds come from measured costs
(infer/costs/pass_costs.py), never from the clock, so decisions are reproducible.

Legend: N numbers of nodes, M numbers of further passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from draftsmith.infer.contract.row import Row
from draftsmith.infer.costs.acceptance import Acceptance
from draftsmith.infer.costs.pass_costs import Costs
from draftsmith.infer.costs.rates import FORGOTTEN, Rate

# Decay of the running means per step: they span about fifty steps, so they follow a text that changes.
KEPT = 0.98
# Before the first step: this many steps of plain decoding, and the share of expanded nodes with a right child.
PRIOR_STEPS = 8.0
PRIOR_COVERAGE = 0.6
# The same for drawn tokens. A row learns alone, so its prior counts for more: a few refusals say little yet.
PRIOR_FOUND, PRIOR_FOUND_WEIGHT = 0.7, 8.0
# The priors of coverage and trust count like this many observations; while nothing is drafted, they are returned to.
PRIOR_WEIGHT = 4.0
TOWARDS_PRIOR = FORGOTTEN / PRIOR_WEIGHT

# What the work of a draft model takes in decoding, in measured seconds: passes are timed one after another of the same
# shape, so they find their weights in the processor's caches, where a draft's passes and the target's displace each
# other. Measured with four rows: 61 ms more than a plain step, where 45 were predicted.
DISPLACED = 1.35

# How many passes of a draft the first one is weighed with.
MOST_AHEAD = 8

# An offer: a node's probability of being reached, and its row. Offers come best first.
Offer = tuple[float, Row]


class FirstGain(NamedTuple):
    """How many offers to run, and the seconds and the tokens that this gains; none where it does not pay."""

    offers: int
    seconds: float
    tokens: float


class Account:
    """Decides for the rows given to `begin`. A policy has one for the whole batch, and one per row that draws its
    draft: what a row draws must not depend on the rows beside it (see infer/costs/policy.py).

    `displaced`: what a draft model's work takes, in measured seconds. `alike`: how many rows like the single one of
    `begin` are decoded together; costs are those of all their passes. They draft alike, but not always at once: a pass
    at some depth is shared by as many of them as this row is there in its own steps.
    """

    def __init__(self, costs: Costs, displaced: float = DISPLACED, alike: int = 1) -> None:
        self._costs = costs = costs.shared(alike) if alike > 1 else costs
        self.displaced = displaced
        self._alike = alike
        self._passes = 0
        self._there: list[Rate] = []
        self._target = costs.of("target")
        self._contexts: dict[Row, int] = {}
        self._seen = 0
        self._spent = self._entered = 0.0
        self._seconds = self._tokens = 0.0
        self._deepening = Rate()
        self.prior_coverage = PRIOR_COVERAGE
        self.prior_found = PRIOR_FOUND
        self._coverage = Rate()
        self._found = Rate()
        self._acceptance = Acceptance()
        self._trust = Rate()

    # one step, from begin to settle

    def begin(self, rows: Sequence[Row]) -> None:
        """Start a step of `rows`; what an unfinished step had spent is forgotten."""
        self._contexts = {row: len(row.ids) for row in rows}
        self._seen = sum(self._contexts.values())
        self._spent = self._entered = 0.0
        self._passes = 0

    def charge(self, name: str, tokens: Mapping[Row, int], entering: bool) -> None:
        """Account for a draft pass over `tokens` of each row. `entering`: every new node goes through this pass; it is
        not a deeper block."""
        self._passes += entering
        seconds = self.seconds(name, tokens, self._shared(self._passes - 1))
        self._spent += seconds
        self._entered += seconds if entering else 0.0

    def settle(self, nodes: Mapping[Row, int], committed: int) -> None:
        """End the step, in which each row verified `nodes` and all rows together committed `committed` tokens."""
        pairs = sum(count * self._contexts[row] for row, count in nodes.items())
        self._seconds = KEPT * self._seconds + self._spent + self._step_seconds(sum(nodes.values()), pairs)
        self._tokens = KEPT * self._tokens + committed
        if self._entered:
            self._deepening.observe(self._spent / self._entered, 1.0, KEPT)
        if self._alike > 1:
            self._there += [Rate() for _ in range(self._passes - len(self._there))]
            for depth, rate in enumerate(self._there):
                rate.observe(float(depth < self._passes), 1.0, KEPT)

    def covered(self, share: float | None) -> None:
        """Update the coverage with what was promised in this step. None (no node was expanded) moves it back towards
        its prior, so that drafting is tried again."""
        if share is None:
            self._coverage.forget(TOWARDS_PRIOR)
        else:
            self._coverage.observe(share, 1.0, KEPT)

    def checked(self, right: int, reached: int, promised: float) -> None:
        """Update with what verification found: of `reached` expanded nodes, `right` had a right child, where their
        confidences promised `promised`."""
        for rate, tries in ((self._found, float(reached)), (self._trust, promised)):
            if reached:
                rate.observe(right, tries, KEPT)
            else:
                rate.forget(TOWARDS_PRIOR)

    def drew(self, outcomes: Sequence[tuple[float, bool]]) -> None:
        """Update with the drawn children that were tried first: the concentration of the distribution that each was
        drawn from, and whether it was accepted. None moves the expectation back towards its prior."""
        for concentration, accepted in outcomes:
            self._acceptance.observe(concentration, accepted)
        if not outcomes:
            self._acceptance.forget(FORGOTTEN / PRIOR_WEIGHT)

    # what is known

    @property
    def plain_seconds(self) -> float:
        """Seconds per token of plain decoding, now."""
        return self._step_seconds(0, 0.0) / max(len(self._contexts), 1)

    @property
    def seconds_per_token(self) -> float:
        """The current estimate of seconds per committed token."""
        prior, rows = self._step_seconds(0, 0.0), max(len(self._contexts), 1)
        found = (self._seconds + PRIOR_STEPS * prior) / (self._tokens + PRIOR_STEPS * rows)
        return min(found, prior / rows)

    @property
    def deepening(self) -> float:
        """What drafting takes, in terms of the passes that every new node goes through: a few steps show it."""
        return self._deepening.value(1.0, 1.0)

    @property
    def coverage(self) -> float:
        """The share of expanded nodes with a right child among those verified, as their confidences promise."""
        return self._coverage.value(self.prior_coverage, PRIOR_WEIGHT)

    @property
    def found(self) -> float:
        """The same share, as verification found it: drawn tokens promise nothing that could be relied on."""
        return self._found.value(self.prior_found, PRIOR_FOUND_WEIGHT)

    def expect_drawn(self, accepted: float) -> None:
        """Before the first verdict: how often drawn tokens were accepted elsewhere."""
        self.prior_found = accepted
        self._acceptance = Acceptance.expecting(accepted)

    def drawn_acceptance(self, concentration: float) -> float:
        """How likely a token is accepted that is drawn from a distribution of this concentration."""
        return self._acceptance.of(concentration)

    @property
    def trust(self) -> float:
        """How much of what confidences promised came true, at most 1."""
        return min(self._trust.value(1.0, PRIOR_WEIGHT), 1.0)

    def seconds(self, name: str, tokens: Mapping[Row, int], shared: float = 1.0) -> float:
        """The cost of a draft pass over this many tokens of each row. `shared`: by which part of the rows alike."""
        seen = sum(self._contexts[row] for row in tokens)
        pairs = sum(count * self._contexts[row] for row, count in tokens.items())
        count = shared * sum(tokens.values())
        return self._costs.of(name)(count, shared * seen, shared * pairs, shared * len(tokens)) / shared

    def _shared(self, depth: int) -> float:
        """The part of the rows alike that is expected to share a pass at this depth, from 0."""
        if self._alike == 1 or not 0 <= depth < len(self._there):
            return 1.0
        return max(self._there[depth].value(1.0, PRIOR_WEIGHT), 1 / self._alike)

    def least_seconds(self, name: str) -> float:
        """The cost of a draft pass over a single token: none is cheaper."""
        return self._costs.of(name)(1)

    # decisions

    def expand(
        self,
        offers: Sequence[Offer],
        pending: Mapping[Row, int],
        entry: str | None,
        coverage: float,
        verified: int = 0,
        at_once: bool = False,
    ) -> int:
        """How many of the offers to run through the draft's pass `entry`: the number with the best net gain.

        See `first_gain`. `entry` None: drafting is free.
        """
        if entry is None:
            return len(offers)
        return self.first_gain(offers, pending, entry, coverage, verified, at_once).offers

    def first_gain(
        self,
        offers: Sequence[Offer],
        pending: Mapping[Row, int],
        entry: str,
        coverage: float,
        verified: int = 0,
        at_once: bool = False,
    ) -> FirstGain:
        """What running offers through the draft's pass `entry` gains, with the passes that may follow it.

        `pending[row]` tokens have to go through the draft before a row's first offer. `coverage`: how often an expanded
        node has a right child; further passes expand one node of each row. What was drafted also has to be verified:
        one token alone may not be worth that where several are, as of a padded pass. The cost includes the passes'
        share of deeper ones, as observed. `verified` nodes are verified in any case. `at_once`: no pass has to follow.
        """
        reach_N, new_N, rows_N, seen_N, pairs_N = (np.zeros(len(offers)) for _ in range(5))
        begun: set[Row] = set()
        for n, (reach, row) in enumerate(offers):
            context = self._contexts[row]
            first = row not in begun
            begun.add(row)
            reach_N[n], rows_N[n], seen_N[n] = reach, first, context if first else 0
            new_N[n] = 1 + (pending.get(row, 0) if first else 0)
            pairs_N[n] = new_N[n] * context
        reach_N, new_N, rows_N, seen_N, pairs_N = (one.cumsum() for one in (reach_N, new_N, rows_N, seen_N, pairs_N))
        cost, further_M = self._costs.of(entry), np.arange(MOST_AHEAD)
        first_N = np.array([cost(*one) for one in zip(new_N, seen_N, pairs_N, rows_N)])
        later = zip(rows_N, seen_N, seen_N, rows_N)
        next_N = np.zeros(len(offers)) if at_once else np.array([cost(*one) for one in later])
        draft_NM = (first_N[:, None] + next_N[:, None] * further_M) * self.deepening
        nodes_NM = verified + np.arange(1, len(offers) + 1)[:, None] + rows_N[:, None] * further_M
        pairs = self._seen + nodes_NM.ravel() * self._seen / len(self._contexts)
        rows = len(self._contexts)
        verify = self._target.many(rows + nodes_NM.ravel(), self._seen, pairs, rows) + self._costs.overhead
        before = self._step_seconds(verified, verified * self._seen / len(self._contexts))
        verify_NM = verify.reshape(nodes_NM.shape) - before
        tokens_NM = reach_N[:, None] * np.cumsum(coverage ** (1.0 + further_M))
        net_NM = tokens_NM * self.seconds_per_token - self.displaced * (draft_NM + verify_NM)
        if not net_NM.size or net_NM.max() <= 0:
            return FirstGain(0, 0.0, 0.0)
        n, m = divmod(int(net_NM.argmax()), MOST_AHEAD)
        return FirstGain(n + 1, float(net_NM[n, m]), float(tokens_NM[n, m]))

    def reading_pays(self, found: FirstGain, unread: Mapping[Row, int], left: Mapping[Row, int], reading: str) -> bool:
        """Whether to let the draft read `unread` tokens of these rows through its pass `reading`; they may commit
        `left` more. `found`: what drafting gains once they are read; per token that it commits it is weighed against
        the seconds of reading."""
        if not unread or not found.offers:
            return False
        gain = found.seconds / (found.offers + found.tokens)
        return gain * sum(left[row] for row in unread) > self.displaced * self.seconds(reading, unread)

    def lengthen(
        self, reach: float, accepted: float, nodes: int, left: int, name: str, unread: int, at_once: bool = False
    ) -> bool:
        """Whether a single row's drawn chain of `nodes` nodes, which are all accepted with probability `reach`, is
        worth one more token, which is accepted with probability `accepted` if they are.

        `unread` tokens have to go through the draft's pass `name` before it is drawn; 0: the distribution is known. Up
        to `left` tokens may follow: one token alone may not be worth it where several are, as of a padded pass.
        `at_once`: their distributions are known with the first.
        """
        (context,) = self._contexts.values()
        before = self._step_seconds(nodes, nodes * context)
        drafting = self._draft_seconds(name, unread, context, nodes) if unread else 0.0
        worth, gained, reach = self.seconds_per_token, 0.0, reach * accepted
        for more in range(1, left + 1):
            gained += reach * worth
            total = nodes + more
            if gained > self.displaced * (drafting + self._step_seconds(total, total * context) - before):
                return True
            reach *= self.found
            drafting += 0.0 if at_once else self._draft_seconds(name, 1, context, nodes + more)
        return False

    def _draft_seconds(self, name: str, tokens: int, context: int, depth: int) -> float:
        """One pass for a single row, and the passes through deeper blocks that follow it, as observed."""
        shared = self._shared(depth)
        seconds = self._costs.of(name)(shared * tokens, shared * context, shared * tokens * context, shared)
        return seconds / shared * self.deepening

    def keep(self, offers: Sequence[Offer], fixed: Mapping[Row, int]) -> int:
        """How many of the offers to verify; `fixed[row]` nodes are verified in any case."""
        if not offers:
            return 0
        base = sum(fixed.values())
        pairs = self._seen + float(sum(count * self._contexts[row] for row, count in fixed.items()))
        new_N = np.arange(len(offers) + 1)
        gained_N = np.cumsum([0.0, *(reach for reach, _ in offers)])
        pairs_N = pairs + np.cumsum([0, *(self._contexts[row] for _, row in offers)])
        rows = len(self._contexts)
        seconds_N = self._target.many(rows + base + new_N, self._seen, pairs_N, rows)
        return int(np.argmax(gained_N * self.seconds_per_token - seconds_N))

    def gains(self, kept: Mapping[Row, Sequence[float]], fixed: Mapping[Row, int]) -> dict[Row, float]:
        """Seconds that each row's kept nodes, given their reaches, are expected to gain; every node costs the same."""
        count, base = sum(map(len, kept.values())), sum(fixed.values())
        if not count:
            return dict.fromkeys(kept, 0.0)
        pairs = float(sum(number * self._contexts[row] for row, number in fixed.items()))
        more = sum(len(reaches) * self._contexts[row] for row, reaches in kept.items())
        seconds = self._step_seconds(base + count, pairs + more) - self._step_seconds(base, pairs)
        worth = self.seconds_per_token
        return {row: worth * sum(reaches) - seconds / count * len(reaches) for row, reaches in kept.items()}

    def next_node(self, nodes: int) -> float:
        """Seconds to verify one more node than `nodes`, for a single row."""
        (context,) = self._contexts.values()
        return self._step_seconds(nodes + 1, (nodes + 1.0) * context) - self._step_seconds(nodes, nodes * context)

    def _step_seconds(self, nodes: int, pairs: float) -> float:
        """A step that verifies `nodes` nodes; `pairs`: of these nodes with the committed tokens of their rows."""
        rows = len(self._contexts)
        return self._target(rows + nodes, self._seen, self._seen + pairs, rows) + self._costs.overhead
