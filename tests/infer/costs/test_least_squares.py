"""Non-negative least squares against every choice of free coefficients."""

import itertools

import numpy as np
import pytest

from draftsmith.infer.costs.least_squares import non_negative


def by_enumeration(design_MN, wanted_M):
    """The best of all solutions over subsets of the coefficients that are nowhere negative."""
    best, found = np.inf, np.zeros(design_MN.shape[1])
    for count in range(design_MN.shape[1] + 1):
        for chosen in map(list, itertools.combinations(range(design_MN.shape[1]), count)):
            x_N = np.zeros(design_MN.shape[1])
            if chosen:
                x_N[chosen] = np.linalg.lstsq(design_MN[:, chosen], wanted_M, rcond=None)[0]
            error = np.linalg.norm(design_MN @ x_N - wanted_M)
            if (x_N >= -1e-12).all() and error < best - 1e-12:
                best, found = error, x_N
    return found


@pytest.mark.parametrize("seed", range(30))
def test_the_least_error_of_all_subsets_is_found(seed):
    rng = np.random.default_rng(seed)
    design_MN, wanted_M = rng.normal(size=(8, 5)), rng.normal(size=8)
    np.testing.assert_allclose(non_negative(design_MN, wanted_M), by_enumeration(design_MN, wanted_M), atol=1e-9)


def test_columns_of_very_different_size_are_one_problem():
    design_MN = np.array([[1.0, 1e9], [1.0, 3e9], [1.0, 7e9]])
    np.testing.assert_allclose(non_negative(design_MN, design_MN @ [2.0, 3e-9]), [2.0, 3e-9], rtol=1e-9)


def test_a_column_of_zeros_gets_nothing():
    np.testing.assert_allclose(non_negative(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([3.0, 3.0])), [3.0, 0.0])
