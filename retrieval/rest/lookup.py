"""REST's compiled lookup: where a context's newest tokens occur in a store's segments and in the context itself.

A *hit* is a place, the number of tokens that match there (its level), its weight (how many places it represents), and
the tokens that follow. All levels are gathered, the longest first. A level with more places than there is room for is
sampled: stratified, keyed by the context, so that the same context finds the same hits in any process.

Streams are mapped arrays or read through a cache (stream_access.py). Importing this module imports numba, so only a
drafter's `bind` does. Written by hand because no package offers all levels of a match over mapped arrays.

Legend: G segments, S levels (index k - 1 for k matching tokens), H hits, D places ahead, N tokens of a stream, M its
suffixes.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import numpy as np
from numba import njit

from draftsmith.retrieval.rest.stream_access import item, length

END = -1
BUCKETS = 1 << 12


class RowIndex:
    """One row's ids, and chains through the places of equal tokens: O(1) per token."""

    __slots__ = ("heads", "ids", "indexed", "length", "previous")

    def __init__(self) -> None:
        self.ids = np.zeros(256, np.int64)
        self.previous = np.zeros(256, np.int64)
        self.heads = np.full(BUCKETS, -1, np.int64)
        self.length = self.indexed = 0

    def catch_up(self, ids: list[int]) -> None:
        """Copy new ids. The newest is left out of the chains: it is the query."""
        if len(ids) > len(self.ids):
            size = 2 * len(ids)
            self.ids, self.previous = np.resize(self.ids, size), np.resize(self.previous, size)
        if len(ids) > self.length:
            self.ids[self.length : len(ids)] = ids[self.length :]
            self.length = len(ids)
        if self.length - 1 > self.indexed:
            index_row(self.ids, self.indexed, self.length - 1, self.heads, self.previous)
            self.indexed = self.length - 1


def contains(tokens_N: np.ndarray, suffixes_M: np.ndarray, vocab: int, ids_T: np.ndarray) -> bool:
    """Whether the tokens `ids_T` (int64) occur consecutively within one document of a segment.

    The suffix array leaves out places that nothing follows, so all but the last token are looked up, and the last one
    is compared with what follows them. It cannot match a separator, which is no id below `vocab`.
    """
    if not len(ids_T) or int(ids_T.max()) >= vocab:
        return False
    if len(ids_T) == 1:
        return bool((tokens_N == ids_T[0]).any())
    lows_S, highs_S = np.zeros(len(ids_T) - 1, np.int64), np.zeros(len(ids_T) - 1, np.int64)
    if narrow(tokens_N, suffixes_M, vocab, ids_T[:-1], lows_S, highs_S) < len(lows_S):
        return False
    places = suffixes_M[lows_S[-1] : highs_S[-1]].astype(np.int64)
    return bool((tokens_N[places + 1] == ids_T[-1]).any())


@njit(cache=True, nogil=True)
def narrow(tokens_N, suffixes_M, vocab, context, lows_S, highs_S):
    """The interval of `suffixes_M` that matches the newest k tokens of `context`, for every k. Returns the longest k.

    The store has no ids from `vocab` on, except its separator.
    """
    low, high = 0, length(suffixes_M)
    lows_S[:] = 0
    highs_S[:] = 0
    for k in range(min(len(context), len(lows_S))):
        token = context[len(context) - 1 - k]
        if token >= vocab:
            return k
        first = _bound(tokens_N, suffixes_M, low, high, k, token)
        last = _bound(tokens_N, suffixes_M, first, high, k, token + 1)
        if first == last:
            return k
        low, high = first, last
        lows_S[k], highs_S[k] = low, high
    return min(len(context), len(lows_S))


@njit(cache=True, nogil=True)
def _bound(tokens_N, suffixes_M, low, high, back, token):
    """The first rank in [low, high) whose token `back` places earlier is at least `token`."""
    while low < high:
        middle = (low + high) >> 1
        place = item(suffixes_M, middle) - back
        if (item(tokens_N, place) if 0 <= place < length(tokens_N) else -1) < token:
            low = middle + 1
        else:
            high = middle
    return low


@njit(cache=True, nogil=True)
def _mixed(state):
    """SplitMix64's output function."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@njit(cache=True, nogil=True)
def plan(context, lows_GS, highs_GS, longest_G, room, per_level, before_GS, ranks_H, levels_H, weights_H):
    """Choose the hits to gather: each one's rank among all places of exactly its level, its level and its weight.

    Writes to `before_GS` how many places of a level the earlier segments hold. Ranks ascend within a level. Returns the
    number of hits.
    """
    segments, most = lows_GS.shape
    key = np.uint64(0x9E3779B97F4A7C15)
    for i in range(max(0, len(context) - most), len(context)):
        key = _mixed(key ^ np.uint64(context[i] + 1))
    count = 0
    for level in range(longest_G.max() if segments else 0, 0, -1):
        size = 0
        for g in range(segments):
            before_GS[g, level - 1] = size
            if level <= longest_G[g]:
                size += highs_GS[g, level - 1] - lows_GS[g, level - 1]
                if level < longest_G[g]:
                    size -= highs_GS[g, level] - lows_GS[g, level]
        taken = min(size, per_level, room - count)
        for i in range(taken):
            rank = i
            if taken < size:
                key = _mixed(key + np.uint64(0x9E3779B97F4A7C15))
                share = (key >> np.uint64(11)) * 2.0**-53
                rank = min(int((i + share) * (size / taken)), size - 1)
            ranks_H[count], levels_H[count], weights_H[count] = rank, level, size / taken
            count += 1
    return count


@njit(cache=True, nogil=True)
def gather(tokens_N, suffixes_M, vocab, lows_S, highs_S, longest, before_S, ranks_H, levels_H, count, ahead_HD):
    """Copy what follows the planned hits that lie in this segment. The separator is not below `vocab`."""
    for h in range(count):
        level = levels_H[h]
        if level > longest:
            continue
        low, high = lows_S[level - 1], highs_S[level - 1]
        inner_low, inner_high = high, high
        if level < longest:
            inner_low, inner_high = lows_S[level], highs_S[level]
        rank = ranks_H[h] - before_S[level - 1]
        left = inner_low - low
        if rank < 0 or rank >= left + high - inner_high:
            continue
        place = item(suffixes_M, low + rank if rank < left else inner_high + rank - left)
        for d in range(ahead_HD.shape[1]):
            place += 1
            token = item(tokens_N, place) if place < length(tokens_N) else vocab
            if token >= vocab:
                ahead_HD[h, d] = END
                break
            ahead_HD[h, d] = token


@njit(cache=True, nogil=True)
def index_row(ids, start, stop, heads, previous):
    """Chain each place of `ids[start:stop]` to the latest earlier place in the same bucket (token modulo buckets)."""
    mask = len(heads) - 1
    for place in range(start, stop):
        bucket = ids[place] & mask
        previous[place] = heads[bucket]
        heads[bucket] = place


@njit(cache=True, nogil=True)
def gather_row(ids, length, vocab, heads, previous, most_back, most_level, lead, weight, first, room,
               ahead_HD, levels_H, weights_H):  # fmt: skip
    """Append the context's own matches, latest first, up to `room` hits in all; the newest place is not indexed.

    They count as if `lead` more tokens matched, because a text repeats itself more than it repeats others. The n-th
    latest weighs weight * (1 + 1 / n). Returns the number of hits.
    """
    token, count = ids[length - 1], first
    place = heads[token & (len(heads) - 1)]
    for _ in range(most_back):
        if place < 0 or count >= room:
            break
        if ids[place] == token:
            level = 1
            while level < most_level and place >= level and ids[place - level] == ids[length - 1 - level]:
                level += 1
            levels_H[count] = min(level + lead, most_level)
            weights_H[count] = weight * (1.0 + 1.0 / (1.0 + count - first))
            for d in range(ahead_HD.shape[1]):
                ahead = ids[place + 1 + d] if place + 1 + d < length else END
                ahead_HD[count, d] = ahead if ahead < vocab else END
                if ahead_HD[count, d] == END:
                    break
            count += 1
        place = previous[place]
    return count
