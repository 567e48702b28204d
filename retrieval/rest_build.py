"""What a REST store holds besides its documents: the backward suffix array of each segment."""

from __future__ import annotations

import numpy as np

from draftsmith.retrieval.suffix_array import backward_suffixes
from draftsmith.retrieval.token_stream import separator


def make_parts(stream: np.ndarray, starts: np.ndarray) -> dict[str, np.ndarray]:
    """`stream` [N] -> {suffixes [M]}; documents need no look, for the separator stands between them."""
    return {"suffixes": backward_suffixes(stream, separator(stream.dtype))}
