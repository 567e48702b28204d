"""Builds trees of outright trials, best first by cumulated confidence, under a budget of nodes and depth.

Each round expands the likeliest nodes of all rows at once; the tree is the `nodes` best candidates found. Candidates
that need no pass are looked up for one node at a time. They are top-k or retrieved tokens, never drawn ones: only trees
of outright trials may be cut (see infer/contract/draft.py).

With a policy that has costs (infer/costs/policy.py), nodes are expanded only while their gain is worth the draft's
pass, and kept only while it is worth the target's; the tree may then be empty.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NamedTuple, Protocol, runtime_checkable

from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.protocols import Budget
from draftsmith.infer.contract.row import Row
from draftsmith.infer.costs.account import Account
from draftsmith.infer.costs.policy import Policy


class Candidate(NamedTuple):
    """A token that could follow, its probability of acceptance given that its parent was accepted, and its source."""

    token: int
    confidence: float
    source: str


class Expandable(Protocol):
    """A growing tree, as a draft model sees it: tokens and parents by leaf, ROOT above them."""

    @property
    def tokens(self) -> list[int]: ...

    @property
    def parents(self) -> list[int]: ...

    def reach(self, leaf: int) -> float: ...

    def depth(self, leaf: int) -> int: ...


class Expansion(Protocol):
    """A drafter's part in one step's trees. `limits`: of each row, 0 where it has no part; `exits[b]`: (depth, exit) of
    the nodes of row b that it ran."""

    limits: Sequence[Budget]
    exits: list[list[tuple[int, int]]]

    def pricing(self, policy: Policy) -> TreePricing: ...

    def expand(self, asked: list[tuple[int, list[int]]]) -> list[list[list[Candidate]]]:
        """The candidates below the asked (row, leaves): ROOT first, parents before their children, and nothing below a
        leaf that was not asked for."""
        ...

    def name(self, b: int, nodes: Mapping[int, int]) -> None:
        """The numbers by which row b's verdict will name the leaves that were run; those without one are dropped."""
        ...


@runtime_checkable
class Expands(Protocol):
    """A drafter that can be asked for the candidates below any leaf of trees that others build with it.

    `width`: how many leaves of a row it takes per pass; `most_rounds`: how many passes per step; it is not asked below
    leaves of less reach than `least_reach`, nor for tokens beyond the depth `max_depth`. `at_once`:
    the first pass gives the candidates of every depth.
    """

    width: int
    most_rounds: int
    least_reach: float
    max_positions: int
    max_depth: int
    at_once: bool

    def join_mix(self) -> None:
        """All its candidates will be outright; ValueError if it was made to draw them."""
        ...

    def expansion(
        self,
        rows: Sequence[Row],
        budgets: Sequence[Budget],
        trees: Sequence[Expandable],
        policy: Policy | None,
        calibrated: Callable[[Row, str, list[float]], list[float]],
    ) -> Expansion: ...


@dataclass(slots=True)
class Leaf:
    """A candidate in the tree: `parent` is an index into the leaves, `reach` the product of confidences down to it."""

    candidate: Candidate
    parent: int
    depth: int
    reach: float


@dataclass(slots=True)
class Growth:
    """One row's growing tree. Leaves are only appended; `expanded` holds those whose children were added."""

    budget: Budget
    leaves: list[Leaf] = field(default_factory=list)
    expanded: set[int] = field(default_factory=set)
    # (-reach, leaf) of those that the budget keeps, in order.
    _best: list[tuple[float, int]] = field(default_factory=list)

    def wanted(self, width: int, min_reach: float) -> list[int]:
        """The best leaves still to expand, among those that the budget keeps."""
        kept = self.kept()
        able = [i for i in kept if i not in self.expanded and self.leaves[i].depth < self.budget.depth]
        return [i for i in able if self.leaves[i].reach >= min_reach][:width]

    def add(self, parent: int, candidates: Sequence[Candidate]) -> None:
        """Append the children of `parent` (ROOT, or a leaf's index)."""
        if parent != ROOT:
            self.expanded.add(parent)
        depth, above, least = self.depth(parent) + 1, self.reach(parent), self.least
        for candidate in candidates:
            reach = above * candidate.confidence
            if reach > least:
                insort(self._best, (-reach, len(self.leaves)))
            self.leaves.append(Leaf(candidate, parent, depth, reach))
        del self._best[self.budget.nodes :]

    def draft(self) -> tuple[Draft, dict[int, int]]:
        """The tree of the best leaves, and leaf -> node."""
        draft, nodes = Draft(), {ROOT: ROOT}
        for i in self.kept():
            leaf = self.leaves[i]
            nodes[i] = draft.outright(
                nodes[leaf.parent], leaf.candidate.token, leaf.candidate.source, leaf.candidate.confidence
            )
        return draft, nodes

    def reach(self, leaf: int) -> float:
        return 1.0 if leaf == ROOT else self.leaves[leaf].reach

    @property
    def least(self) -> float:
        """What the reach of one more leaf has to exceed, to be kept."""
        full = len(self._best) >= self.budget.nodes
        return -self._best[-1][0] if full and self._best else -1.0

    @property
    def tokens(self) -> list[int]:
        return [leaf.candidate.token for leaf in self.leaves]

    @property
    def parents(self) -> list[int]:
        return [leaf.parent for leaf in self.leaves]

    def depth(self, leaf: int) -> int:
        return 0 if leaf == ROOT else self.leaves[leaf].depth

    def reaches(self) -> list[float]:
        """Of the leaves that the budget keeps, best first."""
        return [self.leaves[i].reach for i in self.kept()]

    def kept(self) -> list[int]:
        """The indices of the likeliest leaves, of equal ones those that were added first. A child's reach never exceeds
        its parent's and it is added later, so parents stand first, and every kept leaf's parent is kept."""
        return [leaf for _, leaf in self._best[: self.budget.nodes]]


Expand = Callable[[list[tuple[int, list[int]]]], list[list[list[Candidate]]]]


def grow_looked_up(growth: Growth, below: Callable[[int], Sequence[Candidate]]) -> None:
    """Grow one row's tree from candidates that are looked up: the likeliest leaf first, until no candidate below any
    leaf could be among those that the budget keeps. `below` gives the candidates of a leaf, or of ROOT."""
    waiting = [(-1.0, ROOT)] if growth.budget.nodes and growth.budget.depth else []
    while waiting and -waiting[0][0] > growth.least:
        _, leaf = heappop(waiting)
        first = len(growth.leaves)
        growth.add(leaf, below(leaf))
        if growth.depth(leaf) + 1 < growth.budget.depth:
            least = growth.least
            for number, child in enumerate(growth.leaves[first:], start=first):
                if child.reach > least:
                    heappush(waiting, (-child.reach, number))


def grow(
    growths: Sequence[Growth],
    expand: Expand,
    *,
    width: int,
    min_reach: float = 0.0,
    pricing: TreePricing | None = None,
) -> None:
    """Grow all rows' trees: in every round expand up to `width` of a row's best leaves, down to its depth.

    `expand` takes (row index, leaves) pairs, [ROOT] in the first round, and returns each leaf's candidates. `pricing`
    replaces `min_reach` and cuts the budgets to what pays.
    """

    def reach(b: int, leaf: int) -> float:
        return growths[b].reach(leaf)

    asked = [(b, [ROOT]) for b, growth in enumerate(growths) if growth.budget.nodes and growth.budget.depth]
    if pricing is not None:
        asked = pricing.worth_reading(asked, reach, first=True)
        min_reach = 0.0
    rounds = 1
    while asked:
        for (b, parents), found in zip(asked, expand(asked)):
            for parent, candidates in zip(parents, found):
                growths[b].add(parent, candidates)
        going = [(b, growth) for b, growth in enumerate(growths) if rounds < growth.budget.depth]
        wanted = [(b, growth.wanted(width, min_reach)) for b, growth in going]
        asked = [(b, leaves) for b, leaves in wanted if leaves]
        if pricing is not None:  # whatever follows a node, the nodes above it are verified
            above = sum(max(growths[b].depth(leaf) for leaf in leaves) for b, leaves in asked)
            asked = pricing.worth_reading(asked, reach, verified=above)
        rounds += 1
    if pricing is not None:
        pricing.cut(growths)


@dataclass(frozen=True, slots=True)
class TreePricing:
    """The policy for trees of these rows; their nodes go through the draft's pass `entry` (None: drafting is free).

    `pending[b]` tokens of row b are read with its first node. `at_once`: the pass over the first nodes gives the
    candidates of every depth.
    """

    policy: Policy
    rows: Sequence[Row]
    entry: str | None = None
    pending: Sequence[int] = ()
    at_once: bool = False

    def worth_reading(
        self,
        asked: list[tuple[int, list[int]]],
        reach: Callable[[int, int], float],
        first: bool = False,
        verified: int = 0,
    ) -> list[tuple[int, list[int]]]:
        """Of the asked (row, nodes), the nodes that are worth a pass of the draft, likeliest first over all rows.
        `verified`: how many nodes of all rows are verified in any case."""
        account = self.policy.joint
        return self._chosen(asked, reach, account, account.coverage * account.trust, first, verified)

    def drawn_worth_reading(
        self, asked: list[tuple[int, list[int]]], reach: Callable[[int, int], float], first: bool
    ) -> list[tuple[int, list[int]]]:
        """The same for drawn nodes: each row by its own account, as if it were alone."""
        kept = []
        for one in asked:
            account = self.policy.alone(self.rows[one[0]])
            kept += self._chosen([one], reach, account, account.found, first)
        return kept

    def _chosen(
        self,
        asked: list[tuple[int, list[int]]],
        reach: Callable[[int, int], float],
        account: Account,
        coverage: float,
        first: bool,
        verified: int = 0,
    ) -> list[tuple[int, list[int]]]:
        offers = sorted(
            ((reach(b, node), b, node) for b, nodes in asked for node in nodes), key=lambda offer: -offer[0]
        )
        pending = dict(zip(self.rows, self.pending)) if first else {}
        ranked = [(found, self.rows[b]) for found, b, _ in offers]
        entry = self.entry if first or not self.at_once else None
        count = account.expand(ranked, pending, entry, coverage, verified, self.at_once)
        chosen = {(b, node) for _, b, node in offers[:count]}
        kept = [(b, [node for node in nodes if (b, node) in chosen]) for b, nodes in asked]
        return [(b, nodes) for b, nodes in kept if nodes]

    def cut(self, growths: Sequence[Growth]) -> None:
        """Cut every tree to the nodes worth verifying, and record the acceptance that their confidences predict."""
        nodes = self.policy.width({row: growth.reaches() for row, growth in zip(self.rows, growths)})
        promised, expanded = 0.0, 0
        for row, growth in zip(self.rows, growths):
            growth.budget = Budget(nodes[row], growth.budget.depth)
            kept = growth.kept()
            promised += sum(growth.leaves[i].candidate.confidence for i in kept)
            expanded += len(growth.expanded) + bool(growth.leaves)
        self.policy.joint.covered(promised / expanded if expanded else None)
