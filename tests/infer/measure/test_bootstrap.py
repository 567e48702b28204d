"""Intervals: where they must collapse, and how often they must hold the truth."""

import numpy as np
import pytest

from draftsmith.infer.measure import bootstrap
from draftsmith.infer.measure.bootstrap import (
    difference_interval,
    quantile,
    quantile_interval,
    rates_interval,
    ratio_interval,
    resampled_sums,
    speedup_interval,
    without_small_samples,
)

TOKENS = [10, 20, 30, 5, 80, 12, 44, 7]
SECONDS = [1.0, 3.0, 2.5, 1.0, 9.0, 1.5, 4.0, 1.0]


def mean_interval(values, seed):
    return ratio_interval(values, np.ones(len(values)), seed=seed)


def test_identical_data_collapse_at_one():
    assert speedup_interval(TOKENS, SECONDS, TOKENS, SECONDS, seed=0) == (1.0, 1.0)


def test_the_same_gain_on_every_question_has_no_spread():
    """Paired: however different the questions are, a drafter twice as fast on each is twice as fast."""
    low, high = speedup_interval(TOKENS, [s / 2 for s in SECONDS], TOKENS, SECONDS, seed=0)
    assert low == pytest.approx(2)
    assert high == pytest.approx(2)


def test_the_same_accepted_length_differs_by_nothing():
    assert difference_interval(TOKENS, SECONDS, TOKENS, SECONDS, seed=0) == (0.0, 0.0)


def test_the_seed_decides():
    assert mean_interval(TOKENS, seed=1) == mean_interval(TOKENS, seed=1)
    assert mean_interval(TOKENS, seed=1) != mean_interval(TOKENS, seed=2)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_fewer_than_eight_questions_have_no_interval(count):
    tokens, seconds = TOKENS[:count], SECONDS[:count]
    assert ratio_interval(tokens, seconds, seed=0) is None
    assert speedup_interval(tokens, seconds, tokens, seconds, seed=0) is None
    assert difference_interval(tokens, seconds, tokens, seconds, seed=0) is None
    assert rates_interval([(tokens, seconds)] * 2, [(tokens, seconds)] * 2, seed=0) is None


def test_a_ratio_of_speedups_does_not_see_that_one_run_was_on_a_slower_machine():
    """Run A: 2x over plain. Run B, everything 3 times slower: 3x over its own plain."""
    fast, plain = (TOKENS, [s / 2 for s in SECONDS]), (TOKENS, SECONDS)
    faster, slow_plain = (TOKENS, [s / 3 * 3 for s in SECONDS]), (TOKENS, [s * 3 for s in SECONDS])
    assert rates_interval([faster, plain], [slow_plain, fast], seed=0) == pytest.approx((1.5, 1.5))


def test_intervals_of_older_results_are_dropped_below_eight_pairs():
    row = {"speedup": 2.0, "speedup_interval": [1.9, 2.1], "pairs": 12}
    few = {**row, "pairs": 2, "accepted_length_interval": [1, 2]}
    found = without_small_samples({**row, "by_category": {"qa": few}, "all_questions": {**row, "pairs": 13}})
    assert found["speedup_interval"] == found["all_questions"]["speedup_interval"] == [1.9, 2.1]
    assert found["by_category"]["qa"] == {**few, "speedup_interval": None, "accepted_length_interval": None}


def test_blocks_change_neither_the_number_nor_the_size_of_resamples(monkeypatch):
    monkeypatch.setattr(bootstrap, "BLOCK", 12)
    (sums,) = resampled_sums([TOKENS], seed=0, resamples=101)
    assert sums.shape == (101,)
    assert sums.min() >= len(TOKENS) * min(TOKENS)
    assert sums.max() <= len(TOKENS) * max(TOKENS)
    assert len(set(sums)) > 30


def test_columns_are_resampled_together():
    one, twice = resampled_sums([TOKENS, [2 * t for t in TOKENS]], seed=3, resamples=500)
    assert np.array_equal(twice, 2 * one)


def test_a_mean_has_the_textbook_width():
    """The interval of a mean of n values is close to mean +- 1.96 s / sqrt(n)."""
    values = np.random.default_rng(0).normal(5, 2, size=200)
    low, high = mean_interval(values, seed=0)
    half = 1.96 * values.std() / np.sqrt(200)
    assert low == pytest.approx(values.mean() - half, abs=0.05)
    assert high == pytest.approx(values.mean() + half, abs=0.05)


def test_the_interval_holds_a_known_ratio_about_as_often_as_it_says():
    """60 questions of unlike lengths, a true speedup of 1.7, 20% noise: 95% intervals hold it in 88% to 99% of 200."""
    rng = np.random.default_rng(7)
    held = 0
    for seed in range(200):
        tokens = rng.integers(20, 200, size=60)
        base_seconds = tokens * 0.05 * rng.lognormal(0, 0.2, size=60)
        seconds = tokens * 0.05 / 1.7 * rng.lognormal(0, 0.2, size=60)
        low, high = speedup_interval(tokens, seconds, tokens, base_seconds, seed=seed, resamples=2000)
        held += low <= 1.7 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_a_quantile_is_the_nearest_rank_over_all_groups():
    assert quantile([[3.0, 1.0], [2.0], [4.0]], 0.5) == 2.0
    assert quantile([[3.0, 1.0], [2.0], [4.0]], 0.95) == 4.0
    assert quantile([[5.0]], 0.5) == 5.0
    assert quantile([[], []], 0.5) is None
    assert quantile([], 0.5) is None


def test_the_interval_of_a_median_holds_it_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    held = 0
    for seed in range(200):
        low, high = quantile_interval(rng.exponential(1.0, size=(40, 1)), 0.5, seed=seed, resamples=500)
        held += low <= np.log(2) <= high
    assert 0.88 <= held / 200 <= 0.99


def test_a_quantile_s_interval_draws_whole_groups_in_blocks_of_any_size(monkeypatch):
    """The waits for the turns of one question go together: forty equal waits of one are one observation."""
    groups = [[1.0] * 40, *([2.0] for _ in range(11)), []]
    low, high = quantile_interval(groups, 0.5, seed=0)
    assert (low, high) == (1.0, 2.0)
    monkeypatch.setattr(bootstrap, "BLOCK", 60)
    assert quantile_interval(groups, 0.5, seed=0) == (1.0, 2.0)
    assert quantile_interval([[1.0]] * 7 + [[]], 0.5, seed=0) is None, "seven groups hold values"
