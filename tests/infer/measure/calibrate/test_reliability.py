"""Calibration errors against a plain loop, and the plot."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.infer.costs.calibrator import Calibrator
from draftsmith.infer.measure.calibrate.observations import Observations
from draftsmith.infer.measure.calibrate.reliability import (
    bins,
    draw_reliability,
    expected_calibration_error,
)


def by_loop(confidences, accepted, count):
    total = 0.0
    for i in range(count):
        low, high = i / count, (i + 1) / count
        held = [(c, a) for c, a in zip(confidences, accepted) if low < c <= high or (i == 0 and c == 0)]
        if held:
            total += abs(sum(c for c, _ in held) - sum(a for _, a in held))
    return total / len(confidences)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1000), st.booleans()), min_size=1, max_size=60), st.integers(1, 20))
def test_the_error_is_the_mean_gap_of_the_bins(pairs, count):
    confidences, accepted = np.array([c / 1000 for c, _ in pairs]), np.array([a for _, a in pairs])
    assert expected_calibration_error(confidences, accepted, count) == pytest.approx(
        by_loop(confidences, accepted, count)
    )
    assert sum(one.count for one in bins(confidences, accepted, count)) == len(pairs)


def test_the_figures_of_a_small_case():
    confidences, accepted = np.array([0.9, 0.9, 0.2, 0.2]), np.array([True, False, False, False])
    assert expected_calibration_error(confidences, accepted, 10) == pytest.approx((0.4 * 2 + 0.2 * 2) / 4)
    with pytest.raises(ValueError, match="nothing"):
        expected_calibration_error(np.array([]), np.array([]))


def test_the_plot_is_a_whole_png(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need the extra `train`")
    generator = np.random.default_rng(0)
    raw = generator.uniform(size=200)
    seen = Observations(np.zeros(200, int), np.arange(200) % 2, raw, generator.uniform(size=200) < raw**2)
    curve = Calibrator.fit(seen.raw_N, seen.accepted_N)
    draw_reliability("small", seen, np.array(curve.many(raw.tolist())), (curve, curve), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
