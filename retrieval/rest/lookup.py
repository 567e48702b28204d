"""REST's lookup, compiled: where a context's newest tokens stand in a store's segments and in the context itself.

A *hit* is a place, the number of tokens that match there (its level), the weight of the places that it speaks for, and
what follows it. All levels are gathered, the longest first; of a level with more places than there is room for, a
stratified sample keyed by the context itself is taken, so that the same context finds the same hits in any process.

Streams are mapped arrays or filed ones, read alike (stream_access.py).
Importing this module imports numba, so only a drafter that is being bound does. Which counts make which tree is not
known here (rest_tree.py). Written by hand because no package offers all levels of a match over mapped arrays.

Legend: G segments, S levels (index k - 1 for k matching tokens), H hits, D places ahead, N tokens of a stream, M its
suffixes.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import numpy as np
from numba import njit

from draftsmith.retrieval.rest.stream_access import item, length

END = -1


@njit(cache=True, nogil=True)
def narrow(tokens_N, suffixes_M, vocab, context, lows_S, highs_S):
    """The interval of `suffixes_M` that matches the newest k tokens of `context`, for every k. Returns the longest k.

    Ids from `vocab` on are unknown to the store; its separator is one of them.
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
    """The first rank in [low, high) whose token `back` places before is not below `token`."""
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
    """Choose the hits to gather: for each, its rank among all places of exactly its level, the level, its weight.

    `before_GS` is filled with how many places of a level the earlier segments hold. Ranks ascend within a level.
    Returns the number of hits.
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
    """Copy what follows those of the planned hits that lie in this segment. The separator is beyond `vocab`."""
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
    """Chain the places of `ids[start:stop]` to the latest earlier place of the same token (or of its bucket)."""
    mask = len(heads) - 1
    for place in range(start, stop):
        bucket = ids[place] & mask
        previous[place] = heads[bucket]
        heads[bucket] = place


@njit(cache=True, nogil=True)
def gather_row(ids, length, vocab, heads, previous, most_back, most_level, lead, weight, first, room,
               ahead_HD, levels_H, weights_H):  # fmt: skip
    """Append the context's own matches, latest first, up to `room` hits in all; the newest place is not yet indexed.

    They count as if `lead` more tokens matched: a text repeats itself rather than others. The latest weighs twice
    `weight`, earlier ones ever less of the second. Returns the number of hits.
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
