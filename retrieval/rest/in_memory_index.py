"""Documents that arrive while a store is drafted from: an index in memory, which grows document by document.

Each document starts as a run of its own; a run takes in the one before it as long as that is less than twice as long,
so that runs at least halve in length and every token is sorted again O(log n) times (as log-structured merge trees do).
A run that has an eighth of the bound is left alone from then on, which bounds the longest pause; beyond the bound the
oldest run goes. Nothing is written to disk: `draftsmith store append` does that.

What is drafted from the runs is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from draftsmith.retrieval.rest.suffix_array import backward_suffixes
from draftsmith.retrieval.store.token_stream import check_ids, join, separator

SHARE = 8


@dataclass(frozen=True, slots=True)
class SortedRun:
    """Documents end to end with their backward suffix array, as a store's segment has them."""

    tokens: np.ndarray
    suffixes: np.ndarray


class InMemoryIndex:
    """Runs, the oldest first.

    Args:
        vocab_size: ids from here on are refused.
        dtype: of the token stream.
        max_tokens: about so many tokens are kept, separators among them.
    """

    def __init__(self, vocab_size: int, dtype: np.dtype[Any], max_tokens: int) -> None:
        if max_tokens < SHARE:
            raise ValueError(f"an in_memory_index keeps at least {SHARE} tokens, not {max_tokens}")
        self.vocab_size = vocab_size
        self.dtype = dtype
        self.max_tokens = max_tokens
        self.runs: list[SortedRun] = []

    def __len__(self) -> int:
        return sum(len(run.tokens) for run in self.runs)

    def add(self, ids: Sequence[int]) -> None:
        """Take in one document; an empty one changes nothing."""
        document = check_ids(ids, self.vocab_size, "a document that arrived")
        if not len(document):
            return
        tokens, _ = join([document], self.dtype)
        sealed = self.max_tokens // SHARE
        while self.runs and len(self.runs[-1].tokens) < min(2 * len(tokens), sealed):
            tokens = np.concatenate([self.runs.pop().tokens, tokens])
        self.runs.append(SortedRun(tokens, backward_suffixes(tokens, separator(self.dtype))))
        while len(self) > self.max_tokens and len(self.runs) > 1:
            self.runs.pop(0)
