"""From hits (lookup.py) to a draft, compiled: one trie of what followed them, grown best first up to a node budget.

The probability of a token below a node blends all match lengths, as n-gram models do (interpolated absolute
discounting): level k's discounted counts, with the remaining mass distributed by level k - 1. What the shortest level
leaves over goes to no token, so probabilities estimate acceptance and need not sum to 1. A node d places ahead was
reached by hits that match k + d tokens, and its counts are discounted as level k + d.

Legend: H hits, D places ahead, C children found, N nodes kept, L levels.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from numba import njit


@njit(cache=True, nogil=True)
def _children(ahead_HD, order_H, begin, end, depth, seen_V, epoch, child_H, tokens_C):
    """Number the tokens `depth` places ahead in the hits order_H[begin:end], in order of appearance.

    A hit whose text has ended gets child -1. `seen_V` holds epoch << 32 | child for each token seen in this call.
    """
    count = 0
    for i in range(begin, end):
        token = ahead_HD[order_H[i], depth]
        if token < 0:
            child_H[i] = -1
            continue
        entry = seen_V[token]
        if entry >> 32 != epoch:
            entry = (epoch << 32) | count
            seen_V[token] = entry
            tokens_C[count] = token
            count += 1
        child_H[i] = entry & 0xFFFFFFFF
    return count


@njit(cache=True, nogil=True)
def _count(levels_H, weights_H, order_H, begin, end, child_H, count, counts_LC, totals_L):
    """Sum weights by level and child, then cumulate: level k counts every hit that matches k or more tokens."""
    lowest, highest = 1 << 30, 0
    for i in range(begin, end):
        if child_H[i] >= 0:
            lowest = min(lowest, levels_H[order_H[i]])
            highest = max(highest, levels_H[order_H[i]])
    for level in range(lowest, highest + 1):
        counts_LC[level, :count] = 0.0
        totals_L[level] = 0.0
    for i in range(begin, end):
        if child_H[i] >= 0:
            hit = order_H[i]
            counts_LC[levels_H[hit], child_H[i]] += weights_H[hit]
            totals_L[levels_H[hit]] += weights_H[hit]
    for level in range(highest - 1, lowest - 1, -1):
        for child in range(count):
            counts_LC[level, child] += counts_LC[level + 1, child]
    return lowest, highest


@njit(cache=True, nogil=True)
def _blend(levels_H, weights_H, order_H, begin, end, depth, child_H, count, discounts, strengths,
           counts_LC, totals_L, probs_C):  # fmt: skip
    """P(child | node) for `count` children, from the shortest match up; each level backs off to the one below."""
    lowest, highest = _count(levels_H, weights_H, order_H, begin, end, child_H, count, counts_LC, totals_L)
    probs_C[:count] = 0.0
    for level in range(lowest, highest + 1):
        if totals_L[level] == 0.0:
            continue  # no hits of exactly this level: the same counts as one level up
        place = min(level + depth, len(discounts)) - 1
        discount, strength = discounts[place], strengths[place]
        total, left = strength, strength
        for child in range(count):
            total += counts_LC[level, child]
            left += min(counts_LC[level, child], discount)
        for child in range(count):
            kept = max(counts_LC[level, child] - discount, 0.0)
            probs_C[child] = (kept + left * probs_C[child]) / total


@njit(cache=True, nogil=True)
def _partition(order_H, begin, end, child_H, count, spare_H, ends_C):
    """Sort order_H[begin:end] by child, stably; ends_C[c] ends child c's hits; hits without a child come last."""
    ends_C[: count + 1] = 0
    for i in range(begin, end):
        child = child_H[i]
        ends_C[child if child >= 0 else count] += 1
    place = begin
    for child in range(count + 1):
        size = ends_C[child]
        ends_C[child] = place
        place += size
    for i in range(begin, end):
        child = child_H[i] if child_H[i] >= 0 else count
        spare_H[ends_C[child]] = order_H[i]
        ends_C[child] += 1
    order_H[begin:end] = spare_H[begin:end]


@njit(cache=True, nogil=True)
def _sift_up(heap, size, path_probs, leaf):
    """Insert a leaf into the heap (the most probable first); of equal leaves, the one found earlier wins."""
    i = size
    while i > 0:
        above = (i - 1) >> 1
        other = heap[above]
        if path_probs[other] > path_probs[leaf] or (path_probs[other] == path_probs[leaf] and other < leaf):
            break
        heap[i] = other
        i = above
    heap[i] = leaf


@njit(cache=True, nogil=True)
def _pop(heap, size, path_probs):
    """Remove the best leaf; the heap then holds size - 1."""
    best, moved = heap[0], heap[size - 1]
    size -= 1
    i = 0
    while True:
        below = 2 * i + 1
        if below >= size:
            break
        left, right = heap[below], heap[min(below + 1, size - 1)]
        if path_probs[right] > path_probs[left] or (path_probs[right] == path_probs[left] and right < left):
            below += 1
            left = right
        if path_probs[moved] > path_probs[left] or (path_probs[moved] == path_probs[left] and moved < left):
            break
        heap[i] = left
        i = below
    heap[i] = moved
    return best


@njit(cache=True, nogil=True)
def grow(ahead_HD, levels_H, weights_H, hits, nodes, depth, min_prob, discounts, strengths,
         order_H, child_H, spare_H, seen_V, epoch, counts_LC, totals_L, probs_C, tokens_C, ends_C,
         leaf_node, leaf_token, leaf_depth, leaf_begin, leaf_end, leaf_prob, path_probs, heap,
         tokens_N, parents_N, depths_N, probs_N):  # fmt: skip
    """Write the best tree of at most `nodes` nodes to the last four arrays; returns (its size, the next epoch)."""
    for i in range(hits):
        order_H[i] = i
    size = leaves = kept = 0
    parent, begin, end, ahead, path_prob = -1, 0, hits, 0, 1.0
    while True:
        if ahead < depth:
            epoch += 1
            count = _children(ahead_HD, order_H, begin, end, ahead, seen_V, epoch, child_H, tokens_C)
            if count:
                _blend(levels_H, weights_H, order_H, begin, end, ahead, child_H, count, discounts, strengths,
                       counts_LC, totals_L, probs_C)  # fmt: skip
                _partition(order_H, begin, end, child_H, count, spare_H, ends_C)
            start = begin
            for child in range(count):
                value = path_prob * probs_C[child]
                if value >= min_prob and leaves < len(heap):
                    leaf_node[leaves], leaf_token[leaves], leaf_depth[leaves] = parent, tokens_C[child], ahead + 1
                    leaf_begin[leaves], leaf_end[leaves] = start, ends_C[child]
                    leaf_prob[leaves], path_probs[leaves] = probs_C[child], value
                    _sift_up(heap, size, path_probs, leaves)
                    leaves += 1
                    size += 1
                start = ends_C[child]
        if size == 0 or kept == nodes:
            return kept, epoch
        leaf = _pop(heap, size, path_probs)
        size -= 1
        tokens_N[kept], parents_N[kept] = leaf_token[leaf], leaf_node[leaf]
        depths_N[kept], probs_N[kept] = leaf_depth[leaf], leaf_prob[leaf]
        parent, begin, end, ahead, path_prob = (
            kept,
            leaf_begin[leaf],
            leaf_end[leaf],
            leaf_depth[leaf],
            path_probs[leaf],
        )
        kept += 1
