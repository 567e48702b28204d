"""The paired bootstrap: how much a figure would vary with other questions.

Questions are drawn with replacement, and one draw serves all arrays of a call, so that two runners are always compared
on the same questions. Percentile intervals (Efron and Tibshirani 1993, chapter 13), written by hand because
scipy.stats.bootstrap would be a dependency for thirty lines. Rows of one batch share machine noise, which resampling
single questions does not capture: at large batches the intervals are a little too narrow.

Legend: R resamples, Q questions, N values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 4000
# Fewer questions than this give no interval: resamples of two or three say nothing about other questions.
MIN_PAIRS = 8
CONFIDENCE = 0.95
# Questions drawn at a time, at most: bounds the memory for long question lists.
BLOCK = 500_000

Interval = tuple[float, float] | None
Values = Sequence[float] | np.ndarray


def resampled_sums(columns: Sequence[Values], *, seed: int, resamples: int = RESAMPLES) -> list[np.ndarray]:
    """[R] per column: its sum over each resample of the questions, the same resamples for every column."""
    values = np.asarray(columns, dtype=np.float64)
    assert values.ndim == 2, "the columns of a paired bootstrap have one value per question each"
    count = values.shape[1]
    rng = np.random.default_rng(seed)
    sums, left = [], resamples
    while left > 0:
        size = min(left, max(1, BLOCK // count))
        drawn_RQ = rng.integers(count, size=(size, count))
        sums.append(values[:, drawn_RQ].sum(axis=2))
        left -= size
    return list(np.concatenate(sums, axis=1))


def percentiles(statistic_R: np.ndarray) -> Interval:
    finite = statistic_R[np.isfinite(statistic_R)]
    if not finite.size:
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(finite, [tail, 1 - tail])
    return float(low), float(high)


def ratio_interval(above: Values, below: Values, *, seed: int, resamples: int = RESAMPLES) -> Interval:
    """Interval of sum(above) / sum(below), such as accepted_length or tokens/s; None below MIN_PAIRS questions."""
    if len(above) < MIN_PAIRS:
        return None
    above_R, below_R = resampled_sums([above, below], seed=seed, resamples=resamples)
    return percentiles(_divide(above_R, below_R))


def speedup_interval(
    tokens: Values, seconds: Values, base_tokens: Values, base_seconds: Values, *, seed: int, resamples: int = RESAMPLES
) -> Interval:
    """Interval of (sum(tokens) / sum(seconds)) / (sum(base_tokens) / sum(base_seconds)), the ratio of two rates.

    With steps for seconds it is the interval of the ratio of two accepted_lengths.
    """
    return rates_interval([(tokens, seconds)], [(base_tokens, base_seconds)], seed=seed, resamples=resamples)


def rates_interval(
    above: Sequence[tuple[Values, Values]],
    below: Sequence[tuple[Values, Values]],
    *,
    seed: int,
    resamples: int = RESAMPLES,
) -> Interval:
    """Interval of a product of rates over another, each rate sum(tokens) / sum(seconds): a ratio of two speedups."""
    rates = [*above, *below]
    if len(rates[0][0]) < MIN_PAIRS:
        return None
    sums = resampled_sums([column for rate in rates for column in rate], seed=seed, resamples=resamples)
    statistic_R = np.ones(resamples)
    for index, (tokens_R, seconds_R) in enumerate(zip(sums[::2], sums[1::2])):
        rate_R = _divide(tokens_R, seconds_R)
        statistic_R = statistic_R * rate_R if index < len(above) else _divide(statistic_R, rate_R)
    return percentiles(statistic_R)


def difference_interval(
    above: Values, below: Values, base_above: Values, base_below: Values, *, seed: int, resamples: int = RESAMPLES
) -> Interval:
    """Interval of sum(above) / sum(below) - sum(base_above) / sum(base_below), the difference of two ratios."""
    if len(above) < MIN_PAIRS:
        return None
    sums = resampled_sums([above, below, base_above, base_below], seed=seed, resamples=resamples)
    return percentiles(_divide(sums[0], sums[1]) - _divide(sums[2], sums[3]))


def quantile(groups: Sequence[Values], share: float) -> float | None:
    """The value that `share` of all values do not exceed (nearest rank)."""
    values_N = np.sort(np.concatenate([np.zeros(0), *(np.asarray(group, dtype=np.float64) for group in groups)]))
    return float(values_N[max(math.ceil(share * values_N.size - 1e-9), 1) - 1]) if values_N.size else None


def quantile_interval(groups: Sequence[Values], share: float, *, seed: int, resamples: int = RESAMPLES) -> Interval:
    """Interval of that quantile; groups[i]: the values of question i, such as the waits for its turns."""
    groups = [group for group in groups if len(group)]
    if len(groups) < MIN_PAIRS:
        return None
    values_N = np.concatenate([np.asarray(group, dtype=np.float64) for group in groups])
    order_N = np.argsort(values_N, kind="stable")
    group_N = np.repeat(np.arange(len(groups)), [len(group) for group in groups])[order_N]
    rng = np.random.default_rng(seed)
    found, left = [], resamples
    while left > 0:
        size = min(left, max(1, BLOCK // len(values_N)))
        drawn_RQ = rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=size)
        reached_RN = drawn_RQ[:, group_N].cumsum(axis=1)
        goal_R = share * reached_RN[:, -1:]
        found.append(values_N[order_N][(reached_RN >= goal_R - 1e-9).argmax(axis=1)])
        left -= size
    return percentiles(np.concatenate(found))


def _divide(above_R: np.ndarray, below_R: np.ndarray) -> np.ndarray:
    """NaN for a resample with nothing to divide by; `percentiles` leaves it out."""
    return np.divide(above_R, below_R, out=np.full_like(above_R, np.nan), where=below_R > 0)


def without_small_samples(figures: dict[str, Any]) -> dict[str, Any]:
    """A runner's figures as results.json has them, without intervals from fewer than MIN_PAIRS questions.

    Older results have intervals from two questions on.
    """
    few = figures.get("pairs", MIN_PAIRS) < MIN_PAIRS
    kept = {key: None if few and key.endswith("_interval") else value for key, value in figures.items()}
    if everything := kept.get("all_questions"):
        kept["all_questions"] = without_small_samples(everything)
    if tasks := kept.get("by_category"):
        kept["by_category"] = {task: without_small_samples(row) for task, row in tasks.items()}
    return kept
