"""One row's tree of candidates from several sources, merged by path: a token below a parent is there once, with what
every source says about it.

Leaves are only appended, but their probabilities change as more sources come in. Outright candidates only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.drafters.mixed.pool import Naming, Pool
from draftsmith.infer.drafters.tree_builder import Candidate


@dataclass(slots=True)
class MergedTree:
    """`left[parent][s]`: for each source with candidates below `parent`, the probability that it leaves to others.

    `room`: the most leaves that are kept. `asked[s]`: the leaves below which a draft model was asked.
    """

    pool: Pool
    room: int = 0
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    named: list[dict[int, Naming]] = field(default_factory=list)
    left: dict[int, dict[int, float]] = field(default_factory=dict)
    asked: dict[int, set[int]] = field(default_factory=dict)
    _depths: list[int] = field(default_factory=list)
    _reaches: list[float] = field(default_factory=list)
    _children: dict[int, list[int]] = field(default_factory=dict)
    _places: dict[tuple[int, int], int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def reach(self, leaf: int) -> float:
        """The probability that all tokens down to `leaf` are accepted."""
        return 1.0 if leaf == ROOT else self._reaches[leaf]

    def depth(self, leaf: int) -> int:
        return 0 if leaf == ROOT else self._depths[leaf]

    def child(self, parent: int, token: int) -> int | None:
        return self._places.get((parent, token))

    def children(self, parent: int) -> Sequence[int]:
        return self._children.get(parent, ())

    def add(self, source: int, parent: int, candidates: Sequence[Candidate]) -> None:
        """What `source` has below `parent`, likeliest first."""
        if candidates:
            self._append(source, parent, candidates)
            self._weigh(parent)
            self._multiply(self._children[parent])

    def graft(self, drafts: Sequence[tuple[int, Draft, Sequence[float]]]) -> None:
        """Merge whole drafts: of each the source, the draft, and the probability of each node, given its parent."""
        for source, draft, probabilities in drafts:
            places = {ROOT: ROOT}
            for parent in sorted(draft.trials):
                trials = draft.trials[parent]
                found = [Candidate(draft.tokens[one.node], probabilities[one.node], one.source) for one in trials]
                places.update(zip([one.node for one in trials], self._append(source, places[parent], found)))
        for parent in self.left:
            self._weigh(parent)
        self._multiply(self._children.get(ROOT, ()))

    def _append(self, source: int, parent: int, candidates: Sequence[Candidate]) -> list[int]:
        """The leaves of these tokens."""
        below = self._children.setdefault(parent, [])
        leaves = []
        for rank, (token, confidence, name) in enumerate(candidates):
            leaf = self._places.get((parent, token))
            if leaf is None:
                leaf = len(self.tokens)
                self._places[parent, token] = leaf
                self.tokens.append(token)
                self.parents.append(parent)
                self.confidences.append(0.0)
                self.named.append({})
                self._depths.append(self.depth(parent) + 1)
                self._reaches.append(0.0)
                below.append(leaf)
            self.named[leaf].setdefault(source, Naming(rank, confidence, name))
            leaves.append(leaf)
        known = self.left.setdefault(parent, {})
        known[source] = max(1.0 - sum(candidate.confidence for candidate in candidates), 0.0)
        return leaves

    def _weigh(self, parent: int) -> None:
        """Give the children of `parent` their probabilities, given that it is accepted."""
        left = self.left[parent]
        misses = self.pool.misses(left) if len(left) > 1 else {}
        for leaf in self._children[parent]:
            named = self.named[leaf]
            if misses:
                self.confidences[leaf] = self.pool.probability(misses, named)
            else:
                ((_, naming),) = named.items()
                self.confidences[leaf] = min(naming.confidence, 1.0)

    def _multiply(self, leaves: Sequence[int]) -> None:
        """Give these leaves, and all below them, the probability of all tokens down to them."""
        going = list(leaves)
        while going:
            leaf = going.pop()
            self._reaches[leaf] = self.reach(self.parents[leaf]) * self.confidences[leaf]
            going.extend(self._children.get(leaf, ()))

    # which leaves to keep, and below which to ask

    def kept(self) -> list[int]:
        """The likeliest leaves, best first. A child is never likelier than its parent and was appended later, so a
        stable sort puts parents first."""
        reaches = self._reaches
        return sorted(range(len(reaches)), key=lambda leaf: -reaches[leaf])[: self.room]

    def worth(self, leaf: int) -> float:
        """The probability that the text goes through `leaf` and on with a token that the tree does not have."""
        covered = sum(self.confidences[child] for child in self.children(leaf))
        return self.reach(leaf) * max(1.0 - covered, 0.0)

    def wanted(self, source: int, depth: int, width: int, least: float) -> list[int]:
        """Up to `width` leaves, all above `depth`, below which the draft model of `source` could add the most."""
        asked = self.asked.setdefault(source, set())
        able = [leaf for leaf in (ROOT, *self.kept()) if leaf not in asked and self.depth(leaf) < depth]
        offers = [(self.worth(leaf), leaf) for leaf in able]
        offers = sorted((offer for offer in offers if offer[0] >= least), key=lambda offer: -offer[0])
        return [leaf for _, leaf in offers[:width]]

    def with_ancestors(self, source: int, leaves: Sequence[int]) -> list[int]:
        """`leaves` and those above them that the draft model of `source` has not read, parents first."""
        asked = self.asked[source]
        found: dict[int, None] = {}
        for leaf in leaves:
            path = []
            while leaf not in asked and leaf not in found:
                path.append(leaf)
                if leaf == ROOT:
                    break
                leaf = self.parents[leaf]
            found.update(dict.fromkeys(reversed(path)))
        return list(found)

    # the draft, and what became of it

    def draft(self, least: float = 0.0) -> tuple[Draft, dict[int, int]]:
        """The tree of the kept leaves of at least this reach, and leaf -> node. A node is credited to the source that
        is surest of it; `also` names the others."""
        draft, nodes = Draft(), {ROOT: ROOT}
        for leaf in self.kept():
            if self._reaches[leaf] < least:
                break
            parent, token = nodes[self.parents[leaf]], self.tokens[leaf]
            first, *others = sorted(self.named[leaf].items(), key=lambda item: (-item[1].confidence, item[0]))
            nodes[leaf] = draft.outright(parent, token, first[1].source, self.confidences[leaf])
            if others:
                draft.also[nodes[leaf]] = tuple(naming.source for _, naming in others)
        return draft, nodes

    def grade(self, committed: Sequence[int]) -> None:
        """Show the pool what became of all candidates that the committed text reached, kept or not."""
        at: int | None = ROOT
        for token in committed:
            if at is None:
                return
            left = self.left.get(at, {})
            if len(left) > 1:
                for leaf in self._children[at]:
                    self.pool.observe(left, self.named[leaf], self.tokens[leaf] == token)
            at = self.child(at, token)
