"""The one builder of outright trees: best first by cumulated confidence, under a budget of nodes and depth.

A source is asked to expand the most promising nodes, a few at a time, for all rows at once; the tree is then the
`nodes` best candidates of all. Candidates are top-k or retrieved tokens, never drawn ones: trees of outright trials may
be cut by any rule, trees of draws may not (see infer/tree.py).

This module does not know models or stores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from draftsmith.infer.contract import Budget
from draftsmith.infer.tree import ROOT, Draft


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
        kept = self._best()
        able = [i for i in kept if i not in self.expanded and self.leaves[i].depth < self.budget.depth]
        return [i for i in able if self.leaves[i].worth >= min_worth][:width]

    def add(self, parent: int, candidates: Sequence[Candidate]) -> None:
        """Append the children of `parent` (ROOT, or a leaf's index)."""
        if parent != ROOT:
            self.expanded.add(parent)
        depth = 1 if parent == ROOT else self.leaves[parent].depth + 1
        worth = 1.0 if parent == ROOT else self.leaves[parent].worth
        for candidate in candidates:
            self.leaves.append(Leaf(candidate, parent, depth, worth * candidate.confidence))

    def draft(self) -> tuple[Draft, dict[int, int]]:
        """The tree of the best leaves, and leaf -> node."""
        draft, nodes = Draft(), {ROOT: ROOT}
        for i in self._best():
            leaf = self.leaves[i]
            nodes[i] = draft.outright(
                nodes[leaf.parent], leaf.candidate.token, leaf.candidate.source, leaf.candidate.confidence
            )
        return draft, nodes

    def _best(self) -> list[int]:
        """The indices of the leaves worth most. A child is never worth more than its parent and is appended later, so
        a stable sort keeps parents before children and every kept leaf's parent is kept."""
        order = sorted(range(len(self.leaves)), key=lambda i: -self.leaves[i].worth)
        return order[: self.budget.nodes]


Expand = Callable[[list[tuple[int, list[int]]]], list[list[list[Candidate]]]]


def grow(growths: Sequence[Growth], expand: Expand, *, width: int, min_worth: float = 0.0) -> None:
    """Grow all rows' trees: as often as a row's depth allows, expand up to `width` of its best leaves.

    `expand` takes (row index, leaves) pairs, [ROOT] in the first round, and returns each leaf's candidates.
    """
    asked = [(b, [ROOT]) for b, growth in enumerate(growths) if growth.budget.nodes and growth.budget.depth]
    rounds = 1
    while asked:
        for (b, parents), found in zip(asked, expand(asked)):
            for parent, candidates in zip(parents, found):
                growths[b].add(parent, candidates)
        going = [(b, growth) for b, growth in enumerate(growths) if rounds < growth.budget.depth]
        wanted = [(b, growth.wanted(width, min_worth)) for b, growth in going]
        asked = [(b, leaves) for b, leaves in wanted if leaves]
        rounds += 1
