"""Growth, told from measured times."""

import math

import pytest

from draftsmith.recipes.studies.rest_scale import growth

SIZES = [1e6, 1e7, 1e8]


def test_n_log_n_has_the_power_one_and_other_distributions_are_told_apart():
    assert growth(SIZES, [3e-8 * n * math.log(n) for n in SIZES]) == pytest.approx(1.0)
    assert growth(SIZES, [2e-7 * n for n in SIZES]) < 0.96
    assert growth(SIZES, [1e-14 * n * n for n in SIZES]) > 1.8


def test_one_size_tells_no_growth():
    with pytest.raises(ValueError, match="two sizes"):
        growth([5.0, 5.0], [1.0, 2.0])
