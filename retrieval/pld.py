"""PLD, prompt lookup: draft what followed earlier occurrences of the newest tokens in the row's own text.

All n-grams of up to `max_ngram` tokens are indexed as they arrive, in O(1) per token, so a lookup never rescans the
text. The matches of the longest n-grams are used, later ones before earlier ones. Several make one tree: a match of n
tokens counts n for what follows it, and n + d after d more tokens; a token's probability is its share of these counts
and one for everything else. So a single match is a chain, whose first token has probability n / (n + 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from draftsmith.infer.contract.arguments import at_least
from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.protocols import Budget, Feedback, PassTimer, Target, Verdict
from draftsmith.infer.contract.row import Row
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.drafters.tree_builder import Candidate, Growth, grow_looked_up


class _Match(NamedTuple):
    """An earlier place: how many tokens before it match the newest ones, and what followed."""

    length: int
    tokens: list[int]


class _Index:
    """Where each n-gram of one row ended, latest last."""

    __slots__ = ("ends", "ids", "max_ngram", "upto")

    def __init__(self, ids: list[int], max_ngram: int) -> None:
        self.ids = ids
        self.max_ngram = max_ngram
        self.ends: dict[tuple[int, ...], list[int]] = {}
        self.upto = 0

    def catch_up(self) -> None:
        """Index n-grams that end before the newest token; those that end at it are the next query."""
        ids, ends = self.ids, self.ends
        for end in range(self.upto + 1, len(ids)):
            for n in range(1, min(self.max_ngram, end) + 1):
                ends.setdefault(tuple(ids[end - n : end]), []).append(end)
        self.upto = max(self.upto, len(ids) - 1)


class PromptLookup:
    """Drafts from the row's own text.

    Args:
        num_draft_tokens: how many tokens to copy from each match.
        max_ngram: the longest n-gram to look up; shorter ones are tried if it has too few matches.
        min_ngram: the shortest n-gram to look up.
        matches: how many earlier places go into the tree, latest first.
        nodes: the most nodes of the tree.
        calibration: how often candidates of each confidence are accepted: a file, auto (what `draftsmith calibrate`
            measured for this target, if it did) or none.
        costs: measured costs of the target's passes: a file, auto or none. With costs, each tree is cut to the nodes
            worth verifying.
    """

    name = "pld"
    features: tuple[str, ...] = ()
    drafts_unread = True
    forward_seconds = 0.0
    bytes_moved = 0
    origin = ""

    def __init__(
        self,
        num_draft_tokens: int = 10,
        max_ngram: int = 4,
        min_ngram: int = 1,
        matches: int = 4,
        nodes: int = 16,
        calibration: Any = "auto",
        costs: Any = "auto",
    ) -> None:
        at_least(1, num_draft_tokens=num_draft_tokens, min_ngram=min_ngram, matches=matches, nodes=nodes)
        if max_ngram < min_ngram:
            raise ValueError(f"max_ngram ({max_ngram}) is below min_ngram ({min_ngram})")
        self.num_draft_tokens = num_draft_tokens
        self.max_ngram = max_ngram
        self.min_ngram = min_ngram
        self.matches = matches
        self.nodes = nodes
        self.calibration = calibration
        self.costs = costs
        self._indexes: dict[Row, _Index] = {}

    def pass_timers(self) -> dict[str, PassTimer]:
        return {}

    def bind(self, target: Target) -> None:
        pass

    def open(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._indexes[row] = _Index(row.ids, self.max_ngram)

    def read(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        pass

    def close(self, rows: Sequence[Row]) -> None:
        for row in rows:
            del self._indexes[row]

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        pass

    def abandon(self, rows: Sequence[Row]) -> None:
        pass

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget], policy: Policy | None = None) -> list[Draft]:
        return [self._draft(self._indexes[row], budget) for row, budget in zip(rows, budgets)]

    def _draft(self, index: _Index, budget: Budget) -> Draft:
        limit = Budget(min(self.nodes, budget.nodes), min(self.num_draft_tokens, budget.depth))
        if not limit.nodes or not limit.depth:
            return Draft()
        index.catch_up()
        matches = self._matches(index, limit.depth)
        if len(matches) < 2:  # what the builder would make of it, but at once
            return _chain(matches, limit.nodes, self.name)
        growth = Growth(limit)
        members = {ROOT: matches}

        grow_looked_up(growth, lambda leaf: self._children(growth, members, leaf))
        return growth.draft()[0]

    def _matches(self, index: _Index, depth: int) -> list[_Match]:
        """The longest matches, later places first among equally long ones; each place once."""
        ids, found = index.ids, dict[int, _Match]()
        for n in range(min(self.max_ngram, len(ids)), self.min_ngram - 1, -1):
            # Places of a longer match are among those of its ending: this many hold enough new ones.
            for end in index.ends.get(tuple(ids[-n:]), ())[: -self.matches - len(found) - 1 : -1]:
                if len(found) < self.matches:
                    found.setdefault(end, _Match(n, ids[end : end + depth]))
            if len(found) >= self.matches:
                break
        return list(found.values())

    def _children(self, growth: Growth, members: dict[int, list[_Match]], leaf: int) -> list[Candidate]:
        """The tokens with which the matches through a leaf continue; records who continues with each."""
        depth, through = growth.depth(leaf), members[leaf]
        if len(through) == 1:  # most leaves: the same as below, sooner
            (match,) = through
            if depth == len(match.tokens):
                return []
            members[len(members) - 1] = through
            count = match.length + depth
            return [Candidate(match.tokens[depth], count / (1 + count), self.name)]
        groups: dict[int, list[_Match]] = {}
        for match in through:
            if depth < len(match.tokens):
                groups.setdefault(match.tokens[depth], []).append(match)
        counts = {token: sum(match.length + depth for match in some) for token, some in groups.items()}
        total = 1 + sum(counts.values())
        ranked = sorted(groups, key=lambda token: -counts[token])
        for token in ranked:  # `grow_looked_up` numbers leaves in the order in which their candidates are returned
            members[len(members) - 1] = groups[token]
        return [Candidate(token, counts[token] / total, self.name) for token in ranked]


def _chain(matches: Sequence[_Match], nodes: int, source: str) -> Draft:
    draft = Draft()
    for match in matches:
        lengths = range(match.length, match.length + len(match.tokens))
        confidences = [length / (length + 1) for length in lengths]
        draft.chain(match.tokens[:nodes], source, confidences)
    return draft
