"""Isotonic regression against small cases, and against a definition that needs no algorithm."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.infer.costs.isotonic import pool_adjacent_violators


def test_pooling_gives_the_nearest_rising_sequence() -> None:
    assert pool_adjacent_violators([0.1, 0.5, 0.3, 0.9], [1, 1, 1, 1]) == pytest.approx([0.1, 0.4, 0.4, 0.9])
    assert pool_adjacent_violators([0.9, 0.0], [3, 1]) == pytest.approx([0.675, 0.675])
    assert pool_adjacent_violators([3, 2, 1], [1, 1, 1]) == pytest.approx([2, 2, 2])


def by_definition(values: list[float], weights: list[float]) -> list[float]:
    """Entry i is the largest, over starts up to i, of the smallest mean from there to an end at or behind i."""

    def mean(a: int, b: int) -> float:
        return sum(v * w for v, w in zip(values[a:b], weights[a:b])) / sum(weights[a:b])

    count = len(values)
    return [
        max(min(mean(start, end) for end in range(i + 1, count + 1)) for start in range(i + 1)) for i in range(count)
    ]


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 9)), min_size=1, max_size=12))
def test_pooling_is_the_max_min_of_means(pairs: list[tuple[float, float]]) -> None:
    values, weights = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    assert pool_adjacent_violators(values, weights) == pytest.approx(by_definition(values, weights))
