"""Builds trees of outright trials, best first by cumulated confidence, under a budget of nodes and depth.

Each round expands the likeliest nodes of all rows at once; the tree is the `nodes` best candidates found. Candidates
are top-k or retrieved tokens, never drawn ones: only trees of outright trials may be cut (see infer/contract/draft.py).

With a policy (measured pass costs, infer/costs/policy.py), nodes are expanded only while their gain is worth the
draft's pass, and kept only while it is worth the target's; the tree may then be empty.
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

    def wanted(self, width: int, min_reach: float) -> list[int]:
        """The best leaves still to expand, among those that the budget keeps."""
        kept = self.kept()
        able = [i for i in kept if i not in self.expanded and self.leaves[i].depth < self.budget.depth]
        return [i for i in able if self.leaves[i].reach >= min_reach][:width]

    def add(self, parent: int, candidates: Sequence[Candidate]) -> None:
        """Append the children of `parent` (ROOT, or a leaf's index)."""
        if parent != ROOT:
            self.expanded.add(parent)
        depth, reach = self.depth(parent) + 1, self.reach(parent)
        for candidate in candidates:
            self.leaves.append(Leaf(candidate, parent, depth, reach * candidate.confidence))

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
        """The indices of the likeliest leaves. A child's reach never exceeds its parent's and it is appended later, so
        a stable sort puts parents first, and every kept leaf's parent is kept."""
        order = sorted(range(len(self.leaves)), key=lambda i: -self.leaves[i].reach)
        return order[: self.budget.nodes]


Expand = Callable[[list[tuple[int, list[int]]]], list[list[list[Candidate]]]]


def grow(
    growths: Sequence[Growth],
    expand: Expand,
    *,
    width: int,
    min_reach: float = 0.0,
    policy: Policy | None = None,
    pending: Sequence[int] = (),
) -> None:
    """Grow all rows' trees: in every round expand up to `width` of a row's best leaves, down to its depth.

    `expand` takes (row index, leaves) pairs, [ROOT] in the first round, and returns each leaf's candidates. A `policy`
    replaces `min_reach` and cuts the budgets to what pays; `pending[b]` tokens of row b are read with its first node.
    """

    def reach(b: int, leaf: int) -> float:
        return growths[b].reach(leaf)

    asked = [(b, [ROOT]) for b, growth in enumerate(growths) if growth.budget.nodes and growth.budget.depth]
    if policy is not None:
        asked = worth_reading(asked, reach, policy, pending)
        min_reach = 0.0
    rounds = 1
    while asked:
        for (b, parents), found in zip(asked, expand(asked)):
            for parent, candidates in zip(parents, found):
                growths[b].add(parent, candidates)
        going = [(b, growth) for b, growth in enumerate(growths) if rounds < growth.budget.depth]
        wanted = [(b, growth.wanted(width, min_reach)) for b, growth in going]
        asked = [(b, leaves) for b, leaves in wanted if leaves]
        if policy is not None:
            asked = worth_reading(asked, reach, policy, [0] * len(growths))
        rounds += 1
    if policy is not None:
        cut(growths, policy)


def worth_reading(
    asked: list[tuple[int, list[int]]],
    reach: Callable[[int, int], float],
    policy: Policy,
    pending: Sequence[int],
) -> list[tuple[int, list[int]]]:
    """Of the asked (row, nodes), the nodes that are worth a pass of the draft, likeliest first over all rows."""
    offers = sorted(((reach(b, node), b, node) for b, nodes in asked for node in nodes), key=lambda offer: -offer[0])
    count = policy.expand([(found, b) for found, b, _ in offers], pending)
    chosen = {(b, node) for _, b, node in offers[:count]}
    kept = [(b, [node for node in nodes if (b, node) in chosen]) for b, nodes in asked]
    return [(b, nodes) for b, nodes in kept if nodes]


def cut(growths: Sequence[Growth], policy: Policy) -> None:
    """Cut every tree to the nodes worth verifying, and record the acceptance that their confidences predict."""
    nodes = policy.width([growth.reaches() for growth in growths])
    promised, expanded = 0.0, 0
    for growth in growths:
        growth.budget = Budget(min(growth.budget.nodes, nodes), growth.budget.depth)
        kept = growth.kept()
        promised += sum(growth.leaves[i].candidate.confidence for i in kept)
        expanded += len(growth.expanded) + bool(growth.leaves)
    policy.covered(promised / expanded if expanded else None)


def affordable(drafts: Sequence[Draft], policy: Policy) -> list[Draft]:
    """Outright drafts made without a policy, cut to the nodes worth verifying, best first."""
    reaches = [_reaches(draft) for draft in drafts]
    ranked = [sorted(range(len(found)), key=lambda node: -found[node]) for found in reaches]
    nodes = policy.width([[found[node] for node in order] for found, order in zip(reaches, ranked)])
    return [draft if len(draft) <= nodes else _only(draft, order[:nodes]) for draft, order in zip(drafts, ranked)]


def _reaches(draft: Draft) -> list[float]:
    """Per node the product of the confidences down to it."""
    reaches = [0.0] * len(draft)
    for parent in (ROOT, *range(len(draft))):
        for trial in draft.trials.get(parent, ()):
            assert trial.group.outright, "a drawn node cannot be cut"
            reaches[trial.node] = trial.confidence * (1.0 if parent == ROOT else reaches[parent])
    return reaches


def _only(draft: Draft, chosen: Sequence[int]) -> Draft:
    """The draft of these nodes; in a stable order by reach, a node's parent is always among them."""
    kept = set(chosen)
    fresh, placed = Draft(), {ROOT: ROOT}
    for parent in (ROOT, *range(len(draft))):
        for trial in draft.trials.get(parent, ()) if parent in placed else ():
            if trial.node in kept:
                token = draft.tokens[trial.node]
                placed[trial.node] = fresh.outright(placed[parent], token, trial.source, trial.confidence)
    return fresh
