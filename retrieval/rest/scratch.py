"""What the sparse drafter's compiled kernels write to: arrays that one thread uses again for every draft.

What they mean is told by the kernels (rest_lookup.py, rest_tree.py).

Legend: G segments, S levels, H hits, N nodes, V vocabulary, L leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class Scratch:
    """`segments` may grow (cover); all else is as large as a drafter's settings ever ask for."""

    def __init__(self, segments: int, levels: int, hits: int, ahead: int, nodes: int, vocab: int) -> None:
        self.levels = levels
        self.cover(segments)
        self.ranks_H, self.levels_H, self.weights_H = _ints(hits), _ints(hits), np.zeros(hits)
        self.ahead_HD = _ints(hits, ahead)
        # In the order that grow() takes them: per hit, per token, per level and child, per child.
        self.sorting = [_ints(hits), _ints(hits), _ints(hits)]
        self.seen_V = _ints(vocab)
        self.counting = [
            np.zeros((levels + 1, hits)), np.zeros(levels + 1), np.zeros(hits), _ints(hits), _ints(hits + 1)
        ]  # fmt: skip
        # At each depth a hit stands below one leaf at most.
        most = hits * ahead
        self.leaves = [*(_ints(most) for _ in range(5)), np.zeros(most), np.zeros(most)]
        self.heap = _ints(most)
        self.nodes = [_ints(nodes), _ints(nodes), _ints(nodes), np.zeros(nodes)]
        self.epoch = 0
        # What a segment's tokens and suffixes are read from: by one thread, where it is a cache.
        self.stored: Sequence[tuple[Any, Any]] = ()

    def cover(self, segments: int) -> None:
        """Make room for the intervals of so many segments."""
        self.lows_GS, self.highs_GS, self.before_GS = (_ints(segments, self.levels) for _ in range(3))
        self.longest_G = _ints(segments)
        self.rows = list(zip(self.lows_GS, self.highs_GS, self.before_GS))


def _ints(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int64)
