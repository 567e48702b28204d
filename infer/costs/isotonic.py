"""Isotonic regression by pooling adjacent violators. By hand: no library that this project depends on has it.

What the values mean is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence


def pool_adjacent_violators(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The rising sequence that is closest to `values` in weighted squares."""
    blocks: list[list[float]] = []
    for value, weight in zip(values, weights):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            last = blocks.pop()
            total = blocks[-1][1] + last[1]
            blocks[-1][0] = (blocks[-1][0] * blocks[-1][1] + last[0] * last[1]) / total
            blocks[-1][1], blocks[-1][2] = total, blocks[-1][2] + last[2]
    return [block[0] for block in blocks for _ in range(int(block[2]))]
