"""Suffix arrays over token streams, sorted backwards, so that one narrowing search finds every match length.

The places of a stream are sorted by the tokens up to them, newest first: places that match k + 1 tokens of a context
are a contiguous part of those that match k. So one descent gives every back-off level, in O(log n) per token, and the
continuation of a match starts right behind its place.

libdivsufsort (pydivsufsort) sorts bytes: ids are written as big-endian bytes, whose order is that of the ids, and
places inside an id are dropped.
"""

from __future__ import annotations

import numpy as np

# libdivsufsort counts bytes in 32 bits.
MOST_BYTES = 2**31 - 1


def backward_suffixes(tokens: np.ndarray, separator: int) -> np.ndarray:
    """`tokens` [N] -> [M] uint32: the places p that a token follows, ordered by tokens[p], tokens[p - 1], ..."""
    if not len(tokens):
        return np.zeros(0, np.uint32)
    try:
        from pydivsufsort import divsufsort
    except ImportError as error:
        raise ValueError("building a store needs pydivsufsort: pip install 'draftsmith[retrieval]'") from error
    width = 2 if tokens.dtype == np.uint16 else 3 if int(tokens.max(initial=0)) < 2**24 else 4
    size = len(tokens) * width
    if size > MOST_BYTES:
        raise ValueError(
            f"a segment of {len(tokens)} tokens is too long to sort: at most {MOST_BYTES // width}, see chunk_tokens"
        )
    backward = tokens[::-1].astype(tokens.dtype.newbyteorder(">"))
    as_bytes = backward.view(np.uint8).reshape(len(tokens), tokens.dtype.itemsize)[:, -width:]
    order = divsufsort(np.ascontiguousarray(as_bytes).reshape(-1))
    aligned = order[order % width == 0]
    del order
    aligned //= width
    places = (len(tokens) - 1 - aligned).astype(np.uint32)
    del aligned
    inside = tokens != separator
    inside[:-1] &= inside[1:]
    inside[-1:] = False
    return places[inside[places]]
