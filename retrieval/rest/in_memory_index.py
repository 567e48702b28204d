"""An in-memory index for documents that are added while drafting, searched beside a store's segments.

Each document starts as a run of its own; a new run absorbs its predecessor as long as that is less than twice its
length. So run lengths at least halve, and each token is sorted O(log n) times (a log-structured merge). A run that has
reached an eighth of the bound is never sorted again, which bounds the longest pause; over the bound, the oldest run is
dropped. Nothing is written to disk: `draftsmith store append` does that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from draftsmith.retrieval.rest.suffix_array import backward_suffixes
from draftsmith.retrieval.store.segments import check_ids, join, separator

SHARE = 8


@dataclass(frozen=True, slots=True)
class SortedRun:
    """Documents end to end and their backward suffix array, as in a store's segment."""

    tokens: np.ndarray
    suffixes: np.ndarray


class InMemoryIndex:
    """`runs` are ordered from oldest to newest.

    Args:
        vocab_size: ids from here on are refused.
        dtype: of the token stream.
        max_tokens: how many tokens to keep, separators included.
    """

    def __init__(self, vocab_size: int, dtype: np.dtype[Any], max_tokens: int) -> None:
        if max_tokens < SHARE:
            raise ValueError(f"an in-memory index keeps at least {SHARE} tokens, not {max_tokens}")
        self.vocab_size = vocab_size
        self.dtype = dtype
        self.max_tokens = max_tokens
        self.runs: list[SortedRun] = []

    def __len__(self) -> int:
        return sum(len(run.tokens) for run in self.runs)

    def add_document(self, ids: Sequence[int]) -> None:
        """Index one document; an empty one changes nothing. An interrupt loses no other document."""
        document = check_ids(ids, self.vocab_size, "an added document")
        if not len(document):
            return
        tokens, _ = join([document], self.dtype)
        runs, sealed = list(self.runs), self.max_tokens // SHARE
        while runs and len(runs[-1].tokens) < min(2 * len(tokens), sealed):
            tokens = np.concatenate([runs.pop().tokens, tokens])
        runs.append(SortedRun(tokens, backward_suffixes(tokens, separator(self.dtype))))
        while sum(len(run.tokens) for run in runs) > self.max_tokens and len(runs) > 1:
            runs.pop(0)
        self.runs = runs

    def clear(self) -> None:
        """Drop all documents."""
        self.runs = []
