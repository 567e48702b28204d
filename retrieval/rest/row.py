"""A row's own text as the sparse drafter looks it up: its ids, and chains through the places of equal tokens.

Compiled kernels read and write it (rest_lookup.py); what is drafted from it is not known here.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

BUCKETS = 1 << 12


class RowIndex:
    """One row's ids, and chains through the places of equal tokens: O(1) per token."""

    __slots__ = ("heads", "ids", "indexed", "length", "previous")

    def __init__(self) -> None:
        self.ids = np.zeros(256, np.int64)
        self.previous = np.zeros(256, np.int64)
        self.heads = np.full(BUCKETS, -1, np.int64)
        self.length = self.indexed = 0

    def catch_up(self, ids: list[int], lookup: ModuleType) -> None:
        """Take in new ids; the newest is left out of the chains, for it is the query."""
        new = len(ids) - self.length
        if len(ids) > len(self.ids):
            size = 2 * len(ids)
            self.ids, self.previous = np.resize(self.ids, size), np.resize(self.previous, size)
        if new > 0:
            self.ids[self.length : len(ids)] = ids[self.length :]
            self.length = len(ids)
        if self.length - 1 > self.indexed:
            lookup.index_row(self.ids, self.indexed, self.length - 1, self.heads, self.previous)
            self.indexed = self.length - 1
