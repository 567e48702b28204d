"""The one builder of outright trees: best first by cumulated confidence, under a budget of nodes and depth.

A source is asked to expand the most promising nodes, a few at a time, for all rows at once; the tree is then the
`nodes` best candidates of all. Candidates are top-k or retrieved tokens, never drawn ones: trees of outright trials may
be cut by any rule, trees of draws may not (see infer/contract/draft.py).

Where it is known what passes cost (infer/costs/policy.py), nodes are expanded only while what they promise is worth the
draft's pass, and kept only while it is worth the target's: the budget is then a limit, and nothing may be the best
draft. This module does not know models or stores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.protocols import Budget
from draftsmith.infer.costs.policy import Policy


class Candidate(NamedTuple):
    """A token that could follow, its probability of acceptance given that its parent was accepted, and its source."""

    token: int
    confidence: float
    source: str


@dataclass(slots=True)
class Leaf:
    """A candidate with its place: `parent` is an index into the growing list, `worth` the product down to it."""

    candidate: Candidate
    parent: int
    depth: int
    worth: float


@dataclass(slots=True)
class Growth:
    """One row's growing tree. Leaves are only ever appended; `expanded` marks those that were asked for children."""

    budget: Budget
    leaves: list[Leaf] = field(default_factory=list)
    expanded: set[int] = field(default_factory=set)

    def wanted(self, width: int, min_worth: float) -> list[int]:
        """The best leaves still to expand, among those that would be kept as it stands."""
        kept = self.kept()
        able = [i for i in kept if i not in self.expanded and self.leaves[i].depth < self.budget.depth]
        return [i for i in able if self.leaves[i].worth >= min_worth][:width]

    def add(self, parent: int, candidates: Sequence[Candidate]) -> None:
        """Append the children of `parent` (ROOT, or a leaf's index)."""
        if parent != ROOT:
            self.expanded.add(parent)
        depth, worth = self.depth(parent) + 1, self.worth(parent)
        for candidate in candidates:
            self.leaves.append(Leaf(candidate, parent, depth, worth * candidate.confidence))

    def draft(self) -> tuple[Draft, dict[int, int]]:
        """The tree of the best leaves, and leaf -> node."""
        draft, nodes = Draft(), {ROOT: ROOT}
        for i in self.kept():
            leaf = self.leaves[i]
            nodes[i] = draft.outright(
                nodes[leaf.parent], leaf.candidate.token, leaf.candidate.source, leaf.candidate.confidence
            )
        return draft, nodes

    def worth(self, leaf: int) -> float:
        return 1.0 if leaf == ROOT else self.leaves[leaf].worth

    def depth(self, leaf: int) -> int:
        return 0 if leaf == ROOT else self.leaves[leaf].depth

    def worths(self) -> list[float]:
        """Of the leaves that the budget keeps, best first."""
        return [self.leaves[i].worth for i in self.kept()]

    def kept(self) -> list[int]:
        """The indices of the leaves worth most. A child is never worth more than its parent and is appended later, so
        a stable sort keeps parents before children and every kept leaf's parent is kept."""
        order = sorted(range(len(self.leaves)), key=lambda i: -self.leaves[i].worth)
        return order[: self.budget.nodes]


Expand = Callable[[list[tuple[int, list[int]]]], list[list[list[Candidate]]]]


def grow(
    growths: Sequence[Growth],
    expand: Expand,
    *,
    width: int,
    min_worth: float = 0.0,
    policy: Policy | None = None,
    pending: Sequence[int] = (),
) -> None:
    """Grow all rows' trees: as often as a row's depth allows, expand up to `width` of its best leaves.

    `expand` takes (row index, leaves) pairs, [ROOT] in the first round, and returns each leaf's candidates. With an
    policy, `min_worth` is not looked at, and the budgets are cut to what pays; `pending[b]` tokens of row b have to be
    read with its first node.
    """
    asked = [(b, [ROOT]) for b, growth in enumerate(growths) if growth.budget.nodes and growth.budget.depth]
    if policy is not None:
        asked = _worth_expanding(growths, asked, policy, pending)
        min_worth = 0.0
    rounds = 1
    while asked:
        for (b, parents), found in zip(asked, expand(asked)):
            for parent, candidates in zip(parents, found):
                growths[b].add(parent, candidates)
        going = [(b, growth) for b, growth in enumerate(growths) if rounds < growth.budget.depth]
        wanted = [(b, growth.wanted(width, min_worth)) for b, growth in going]
        asked = [(b, leaves) for b, leaves in wanted if leaves]
        if policy is not None:
            asked = _worth_expanding(growths, asked, policy, [0] * len(growths))
        rounds += 1
    if policy is not None:
        cut(growths, policy)


def _worth_expanding(
    growths: Sequence[Growth], asked: list[tuple[int, list[int]]], policy: Policy, pending: Sequence[int]
) -> list[tuple[int, list[int]]]:
    """Those of the asked leaves, best first over all rows, that a pass of the draft pays for."""
    offers = [(growths[b].worth(leaf), b, leaf) for b, leaves in asked for leaf in leaves]
    offers.sort(key=lambda offer: -offer[0])
    count = policy.expand([(worth, b) for worth, b, _ in offers], pending)
    chosen: dict[int, list[int]] = {}
    for _, b, leaf in offers[:count]:
        chosen.setdefault(b, []).append(leaf)
    return sorted(chosen.items())


def cut(growths: Sequence[Growth], policy: Policy) -> None:
    """Cut every tree to the nodes that the target's pass is worth, and note what the expanded nodes then promise."""
    nodes = policy.width([growth.worths() for growth in growths])
    promised, expanded = 0.0, 0
    for growth in growths:
        growth.budget = Budget(min(growth.budget.nodes, nodes), growth.budget.depth)
        kept = growth.kept()
        promised += sum(growth.leaves[i].candidate.confidence for i in kept)
        expanded += len(growth.expanded) + bool(growth.leaves)
    policy.covered(promised / expanded if expanded else None)


def affordable(drafts: Sequence[Draft], policy: Policy) -> list[Draft]:
    """Outright drafts that were made elsewhere, cut to the nodes that the target's pass is worth, best first."""
    worths = [_worths(draft) for draft in drafts]
    ranked = [sorted(range(len(found)), key=lambda node: -found[node]) for found in worths]
    nodes = policy.width([[found[node] for node in order] for found, order in zip(worths, ranked)])
    return [draft if len(draft) <= nodes else _only(draft, order[:nodes]) for draft, order in zip(drafts, ranked)]


def _worths(draft: Draft) -> list[float]:
    """Per node the confidences multiplied down to it."""
    worths = [0.0] * len(draft)
    for parent in (ROOT, *range(len(draft))):
        for trial in draft.trials.get(parent, ()):
            assert trial.group.outright, "a drawn node cannot be cut"
            worths[trial.node] = trial.confidence * (1.0 if parent == ROOT else worths[parent])
    return worths


def _only(draft: Draft, chosen: Sequence[int]) -> Draft:
    """The draft of these nodes; a stable order of worths holds a node's parent wherever it holds the node."""
    kept = set(chosen)
    fresh, placed = Draft(), {ROOT: ROOT}
    for parent in (ROOT, *range(len(draft))):
        for trial in draft.trials.get(parent, ()) if parent in placed else ():
            if trial.node in kept:
                token = draft.tokens[trial.node]
                placed[trial.node] = fresh.outright(placed[parent], token, trial.source, trial.confidence)
    return fresh
