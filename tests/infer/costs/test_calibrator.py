"""Calibrators between, at and beyond their points, and every fit against known distributions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.infer.costs.calibrator import Calibrator

GRID = np.linspace(0.02, 0.98, 49)


def observed(distribution, count, seed=0):
    """`count` raw confidences, and whether each was accepted under `distribution`."""
    generator = np.random.default_rng(seed)
    raw = generator.uniform(0, 1, count)
    return raw, generator.uniform(size=count) < distribution(raw)


def sharpened(power, factor=1.0):
    return lambda raw: factor * raw**power / (factor * raw**power + (1 - raw) ** power)


def test_a_curve_is_linear_between_its_points_and_constant_beyond():
    curve = Calibrator((0.2, 0.4, 0.8), (0.1, 0.5, 0.6))
    asked = [0.0, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0]
    found = [0.1, 0.1, 0.3, 0.5, 0.55, 0.6, 0.6]
    assert [curve(raw) for raw in asked] == pytest.approx(found)
    assert curve.many(asked) == pytest.approx(found)


@pytest.mark.parametrize(
    ("raw", "probability"),
    [((), ()), ((0.1,), (0.1, 0.2)), ((0.2, 0.2), (0.1, 0.2)), ((0.1, 0.2), (0.3, 0.2)), ((0.1,), (1.0,))],
)
def test_a_curve_that_falls_or_leaves_0_to_1_is_refused(raw, probability):
    with pytest.raises(ValueError, match="curve"):
        Calibrator(raw, probability)


@pytest.mark.parametrize("distribution", [lambda raw: raw**2, lambda raw: 0.3 + 0.4 * raw, sharpened(0.4)])
def test_the_isotonic_fit_finds_the_distribution_that_made_the_observations(distribution):
    for fit in (Calibrator.fit, Calibrator.binned):
        curve = fit(*observed(distribution, 40_000))
        assert np.abs(np.array(curve.many(GRID)) - distribution(GRID)).max() < 0.05


@pytest.mark.parametrize(("power", "factor"), [(0.3, 1.0), (1.0, 0.2), (2.5, 3.0)])
def test_the_logistic_fit_finds_the_power_and_factor_that_made_the_observations(power, factor):
    distribution = sharpened(power, factor)
    curve = Calibrator.logistic(*observed(distribution, 2_000))
    assert np.abs(np.array(curve.many(GRID)) - distribution(GRID)).max() < 0.06


def test_a_source_that_is_wrong_where_it_is_sure_gets_one_probability_for_all():
    raw, accepted = observed(lambda raw: 0.6 - 0.4 * raw, 2_000)
    for fit in (Calibrator.fit, Calibrator.logistic):
        assert fit(raw, accepted).many([0.05, 0.5, 0.95]) == pytest.approx([accepted.mean()] * 3, abs=0.02)


def test_binned_curves_over_the_same_confidences_keep_the_order_of_what_they_were_fitted_to():
    raw, accepted = observed(lambda raw: raw**2, 900)
    more = accepted | (np.random.default_rng(5).uniform(size=900) < 0.1)
    lower, upper = Calibrator.binned(raw, accepted), Calibrator.binned(raw, more)
    assert lower.raw == upper.raw
    assert all(a <= b for a, b in zip(lower.probability, upper.probability))


def test_a_weight_counts_as_repeated_observations():
    raw, accepted = observed(lambda raw: raw, 300)
    counts = np.random.default_rng(1).integers(0, 4, 300)
    for fit in (Calibrator.fit, Calibrator.logistic):
        once = fit(np.repeat(raw, counts), np.repeat(accepted, counts))
        assert fit(raw, accepted, counts).many(GRID) == pytest.approx(once.many(GRID), abs=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=120))
def test_every_fit_is_a_rising_curve_inside_0_and_1(pairs):
    raw, accepted = zip(*pairs)
    for fit in (Calibrator.fit, Calibrator.logistic, Calibrator.binned):
        curve = fit(raw, accepted)
        found = curve.many(np.linspace(0, 1, 21))
        assert found == sorted(found)
        assert 0 < found[0] <= found[-1] < 1


def test_nothing_observed_is_refused():
    with pytest.raises(ValueError, match="got 0"):
        Calibrator.fit([], [])
    with pytest.raises(ValueError, match="not a number"):
        Calibrator.fit([0.1, float("nan")], [True, False])
