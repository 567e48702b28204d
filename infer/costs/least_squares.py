"""Least squares with coefficients that are nowhere negative: the active-set method of Lawson and Hanson (1974).

By hand because numpy has none, and twenty lines are no reason for scipy. It knows nothing of what is fitted.

Legend: M measurements, N coefficients.
"""

from __future__ import annotations

import numpy as np


def non_negative(design_MN: np.ndarray, wanted_M: np.ndarray) -> np.ndarray:
    """[N] the x >= 0 that makes |design x - wanted| least."""
    scale_N = np.linalg.norm(design_MN, axis=0)
    scale_N[scale_N == 0] = 1.0
    a_MN = design_MN / scale_N
    count = a_MN.shape[1]
    x_N, free_N = np.zeros(count), np.zeros(count, dtype=bool)
    for _ in range(10 * count):
        gain_N = np.where(free_N, -np.inf, a_MN.T @ (wanted_M - a_MN @ x_N))
        best = int(gain_N.argmax())
        if gain_N[best] <= 1e-10 * max(float(np.linalg.norm(wanted_M)), 1e-300):
            break
        free_N[best] = True
        x_N = _inside(a_MN, wanted_M, x_N, free_N)
    return x_N / scale_N


def _inside(a_MN: np.ndarray, wanted_M: np.ndarray, x_N: np.ndarray, free_N: np.ndarray) -> np.ndarray:
    """The solution over the free coefficients; one that would turn negative on the way to it is tied to zero."""
    while True:
        goal_N = np.zeros_like(x_N)
        goal_N[free_N] = np.linalg.lstsq(a_MN[:, free_N], wanted_M, rcond=None)[0]
        bad_N = free_N & (goal_N <= 0)
        if not bad_N.any():
            return goal_N
        step = float(np.min(x_N[bad_N] / np.maximum(x_N[bad_N] - goal_N[bad_N], 1e-300)))
        x_N = x_N + step * (goal_N - x_N)
        free_N &= x_N > 1e-14
        x_N = np.where(free_N, x_N, 0.0)
