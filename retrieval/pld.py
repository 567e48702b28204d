"""PLD, prompt lookup: draft what followed earlier occurrences of the newest tokens in the row's own text.

All n-grams of up to `max_ngram` tokens are indexed as they arrive, in O(1) per token, so a lookup never rescans the
text. Several matches make one tree: matches of the longest n-gram first, and later ones before earlier ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.protocols import Budget, Feedback, PassTimer, Target, Verdict
from draftsmith.infer.contract.row import Row


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
    """

    name = "pld"
    features: tuple[str, ...] = ()
    forward_seconds = 0.0
    bytes_moved = 0
    origin = ""

    def __init__(
        self, num_draft_tokens: int = 10, max_ngram: int = 4, min_ngram: int = 1, matches: int = 4, nodes: int = 16
    ) -> None:
        for what, value in (
            ("num_draft_tokens", num_draft_tokens), ("min_ngram", min_ngram), ("matches", matches), ("nodes", nodes)
        ):  # fmt: skip
            if value < 1:
                raise ValueError(f"{what} must be at least 1, not {value}")
        if max_ngram < min_ngram:
            raise ValueError(f"max_ngram ({max_ngram}) is below min_ngram ({min_ngram})")
        self.num_draft_tokens = num_draft_tokens
        self.max_ngram = max_ngram
        self.min_ngram = min_ngram
        self.matches = matches
        self.nodes = nodes
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

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget], policy: Any = None) -> list[Draft]:
        return [self._draft(self._indexes[row], budget) for row, budget in zip(rows, budgets)]

    def _draft(self, index: _Index, budget: Budget) -> Draft:
        """The latest match's continuation first, then branches where earlier matches differ from it."""
        draft = Draft()
        index.catch_up()
        ids = index.ids
        depth, nodes = min(self.num_draft_tokens, budget.depth), min(self.nodes, budget.nodes)
        if not depth or not nodes:
            return draft
        found = 0
        for n in range(min(self.max_ngram, len(ids)), self.min_ngram - 1, -1):
            ends = index.ends.get(tuple(ids[-n:]), ())
            for end in ends[: -self.matches - 1 : -1]:
                parent = ROOT
                for token in ids[end : end + depth]:
                    node = draft.child(parent, token)
                    if node is None:
                        if len(draft) >= nodes:
                            return draft
                        node = draft.outright(parent, token, self.name, n / (n + 1) / (1 + found))
                    parent = node
                found += 1
            if found >= self.matches:
                break
        return draft
