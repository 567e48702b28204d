"""A token stream: documents end to end, a separator behind each, in 16 bits where the vocabulary allows.

The separator is the largest number of the type and never a token, so that neither a match nor a continuation can run
from one document into the next. What the tokens mean is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def stream_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds the ids and a separator: 16 bits up to 65,535 ids, else 32."""
    return np.dtype(np.uint16) if vocab_size <= np.iinfo(np.uint16).max else np.dtype(np.uint32)


def separator(dtype: np.dtype[Any]) -> int:
    return int(np.iinfo(dtype).max)


def join(documents: Sequence[np.ndarray], dtype: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Documents of ids -> (stream [N], starts [documents + 1]); document i is stream[starts[i] : starts[i + 1] - 1]."""
    lengths = np.fromiter((len(document) for document in documents), np.int64, len(documents))
    starts = np.zeros(len(documents) + 1, np.int64)
    np.cumsum(lengths + 1, out=starts[1:])
    stream = np.full(starts[-1], separator(dtype), dtype)
    for start, document in zip(starts, documents):
        stream[start : start + len(document)] = document
    return stream, starts


def check_ids(ids: Sequence[int] | np.ndarray, vocab_size: int, where: str) -> np.ndarray:
    """`ids` as int64; ValueError where one is outside the vocabulary."""
    given = np.asarray(ids, dtype=np.int64)
    if given.size and not (0 <= given.min() and given.max() < vocab_size):
        bad = int(given[(given < 0) | (given >= vocab_size)][0])
        raise ValueError(f"{where}: token id {bad} is outside the vocabulary of {vocab_size}")
    return given
