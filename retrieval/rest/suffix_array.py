"""Suffix arrays over token streams, read backwards: the order that finds the longest match in one narrowing search.

Sorting the places of a stream by the tokens that *precede* them, newest first, makes the places that match k + 1 tokens
of a context a contiguous part of those that match k. So one descent gives every back-off level, in O(log n) per token,
and what follows each place stands right behind it.

The sorting is libdivsufsort's (pydivsufsort), made for bytes: ids are written as big-endian bytes, whose order is that
of the ids, and the places between two ids are dropped. Documents are not known here but for the separator.
"""

from __future__ import annotations

import numpy as np

# libdivsufsort counts bytes in 32 bits.
MOST_BYTES = 2**31 - 1


def backward_suffixes(tokens: np.ndarray, separator: int) -> np.ndarray:
    """[M] uint32: the places that a token follows, ordered by tokens[p], tokens[p - 1], ...; `tokens` is [N]."""
    if not len(tokens):
        return np.zeros(0, np.uint32)
    try:
        from pydivsufsort import divsufsort
    except ImportError as error:
        raise ValueError(
            "building a store needs pydivsufsort, which the extra `retrieval` installs: pip install "
            "'draftsmith[retrieval]'"
        ) from error
    width = 2 if tokens.dtype == np.uint16 else 3 if int(tokens.max(initial=0)) < 2**24 else 4
    size = len(tokens) * width
    if size > MOST_BYTES:
        raise ValueError(f"a segment of {len(tokens)} tokens is too long to sort: at most {MOST_BYTES // width}")
    backward = tokens[::-1].astype(tokens.dtype.newbyteorder(">"))
    as_bytes = backward.view(np.uint8).reshape(len(tokens), tokens.dtype.itemsize)[:, -width:]
    order = divsufsort(np.ascontiguousarray(as_bytes).reshape(-1))
    aligned = order[order % width == 0]
    del order
    aligned //= width
    places = (len(tokens) - 1 - aligned).astype(np.uint32)
    del aligned
    return places[followed(tokens, separator)[places]]


def followed(tokens: np.ndarray, separator: int) -> np.ndarray:
    """[N] bool: a token of a document that another one of the same document follows."""
    inside = tokens != separator
    inside[:-1] &= inside[1:]
    inside[-1:] = False
    return inside
