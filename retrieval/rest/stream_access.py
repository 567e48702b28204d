"""How the compiled lookup reads an array of a store: mapped, or from its file through a cache of fixed size.

A mapped array is fastest, but each touched page brings in its neighbours and counts as this process's memory: a lookup
in 100 million tokens reads a thousand places and maps 240 MB. The cache is direct-mapped: each page has one slot, which
its number is hashed to.

An array read through the cache is a plain tuple, because numba does not cache code that takes our own classes: (file
descriptor, length, the cache's pages viewed as the array's dtype, the cache's tags, the tag of its first page).
Importing this module imports numba.

Legend: S slots, B bytes or numbers of a page.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numba import njit, types
from numba.extending import overload

from draftsmith.retrieval.store.segments import OpenFile

PAGE = 4096
CachedArray = tuple[int, int, np.ndarray, np.ndarray, int]

if hasattr(os, "pread"):
    pread = types.ExternalFunction("pread", types.int64(types.int32, types.voidptr, types.uint64, types.int64))


class PageCache:
    """Pages of several files, for one thread."""

    def __init__(self, megabytes: float) -> None:
        slots = 2 ** max(int(megabytes * 2**20 / PAGE).bit_length() - 1, 0)
        self._pages_SB = np.zeros((slots, PAGE), np.uint8)
        self._tags_S = np.full(slots, -1)

    def over(self, files: Sequence[OpenFile]) -> list[CachedArray]:
        """The files' arrays in the form that the kernels take."""
        arrays, tag = [], 0
        for file in files:
            arrays.append((file.number, file.length, self._pages_SB.view(file.dtype), self._tags_S, tag))
            tag += file.length * file.dtype.itemsize // PAGE + 1
        return arrays


def length(stream):
    """The number of places in a stream."""
    raise NotImplementedError("only compiled code can call this")


def item(stream, place):
    """One place of a stream."""
    raise NotImplementedError("only compiled code can call this")


@overload(length)
def _length(stream):
    if isinstance(stream, types.Array):
        return lambda stream: len(stream)
    return lambda stream: stream[1]


@overload(item)
def _item(stream, place):
    if isinstance(stream, types.Array):
        return lambda stream, place: np.int64(stream[place])

    def read(stream, place):
        file, numbers, pages_SB, tags_S, first = stream
        each = pages_SB.shape[1]
        page = place // each
        slot = np.int64((np.uint64(first + page) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)) & (len(tags_S) - 1)
        if tags_S[slot] != first + page:
            _fill(file, pages_SB[slot], page, min(each, numbers - page * each))
            tags_S[slot] = first + page
        return np.int64(pages_SB[slot, place - page * each])

    return read


@njit(cache=True, nogil=True)
def _fill(file, page_B, page, numbers):
    wanted = numbers * page_B.itemsize
    if pread(file, page_B.ctypes, wanted, page * PAGE) != wanted:
        raise ValueError("a file of the store has become shorter or can no longer be read: build the store again")
