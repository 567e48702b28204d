"""Does a text stand in a store word for word? One descent in the backward suffix array tells, whatever its length.

A text stands in a segment where all its tokens follow one another within one document. What that says about a
measurement is not known here (infer/measure/leakage.py).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def contains(
    tokens_N: np.ndarray, suffixes_M: np.ndarray, known: int, ids_T: np.ndarray, narrow: Callable[..., int]
) -> bool:
    """Whether `ids_T` (int64, all below `known`) is a run of `tokens_N`. `narrow` is rest_lookup's.

    The array leaves out places that nothing follows, so all but the last token are looked up, and it is looked for
    behind them. It cannot be a separator: that is no id.
    """
    if not len(ids_T) or int(ids_T.max()) >= known:
        return False
    if len(ids_T) == 1:
        return bool((tokens_N == ids_T[0]).any())
    lows_S, highs_S = np.zeros(len(ids_T) - 1, np.int64), np.zeros(len(ids_T) - 1, np.int64)
    if narrow(tokens_N, suffixes_M, known, ids_T[:-1], lows_S, highs_S) < len(lows_S):
        return False
    places = suffixes_M[lows_S[-1] : highs_S[-1]].astype(np.int64)
    return bool((tokens_N[places + 1] == ids_T[-1]).any())
