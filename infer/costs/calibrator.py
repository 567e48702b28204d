"""A rising curve from raw confidence to probability of acceptance, and three ways to fit one to observations.

Isotonic (`fit`), isotonic over bins (`binned`, for curves that are subtracted from one another), and logistic
(`logistic`, for few observations); arXiv 1706.04599 compares such fits. Probabilities stay inside (0, 1), because odds
serve as weights elsewhere.

Legend: N observations, F coefficients.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

# The least number, and the least share, of all observations in one step of the isotonic curve.
MIN_STEP, STEP_SHARE = 10.0, 1 / 200
# The most bins of a binned curve, and the least observations in one.
BINS, MIN_BIN = 20, 40
# Observations that each step starts with, half of them accepted.
PRIOR = 1.0
EDGE = 1e-6
# A logistic curve has a point at each of these log-odds.
LOG_ODDS = np.linspace(-9.0, 9.0, 73)


@dataclass(frozen=True, slots=True)
class Calibrator:
    """Linear between its points, constant beyond them. `raw` ascends; `probability` never falls, inside (0, 1)."""

    raw: tuple[float, ...]
    probability: tuple[float, ...]

    def __post_init__(self) -> None:
        raw, probability = self.raw, self.probability
        if not raw or len(raw) != len(probability):
            raise ValueError(
                f"a curve needs as many probabilities as confidences; got {len(probability)} and {len(raw)}"
            )
        if any(not a < b for a, b in pairwise(raw)) or any(not a <= b for a, b in pairwise(probability)):
            raise ValueError("a curve must rise")
        if not 0 < probability[0] <= probability[-1] < 1:
            raise ValueError("a curve's probabilities must lie between 0 and 1")

    def __call__(self, raw: float) -> float:
        xs, ys = self.raw, self.probability
        above = bisect_right(xs, raw)
        if above == 0:
            return ys[0]
        if above == len(xs):
            return ys[-1]
        x0, x1, y0, y1 = xs[above - 1], xs[above], ys[above - 1], ys[above]
        return y0 + (y1 - y0) * (raw - x0) / (x1 - x0)

    def many(self, raw: Sequence[float]) -> list[float]:
        found: list[float] = np.interp(raw, self.raw, self.probability).tolist()
        return found

    @classmethod
    def fit(cls, raw: Any, accepted: Any, weights: Any = None) -> Calibrator:
        """Isotonic: `accepted` (0, 1 or a share) over `raw`, weighted."""
        raw_N, accepted_N, weights_N = _observations(raw, accepted, weights)
        xs, where_N = np.unique(raw_N, return_inverse=True)
        mass = np.bincount(where_N, weights_N)
        hits = np.bincount(where_N, weights_N * accepted_N)
        starts = _steps(_isotonic(hits / mass, mass), mass)
        mass, hits = np.add.reduceat(mass, starts), np.add.reduceat(hits, starts)
        steps = _isotonic((hits + PRIOR / 2) / (mass + PRIOR), mass)
        ends = np.append(starts[1:] - 1, len(xs) - 1)
        return cls._through(np.stack([xs[starts], xs[ends]], 1).ravel(), np.repeat(steps, 2))

    @classmethod
    def binned(cls, raw: Any, accepted: Any) -> Calibrator:
        """Isotonic over bins of equal size, joined at their centres. The bins depend on `raw` alone, so curves over
        the same `raw` can be subtracted from one another."""
        raw_N, accepted_N, _ = _observations(raw, accepted, None)
        order = np.argsort(raw_N, kind="stable")
        parts = np.array_split(order, max(min(BINS, len(order) // MIN_BIN), 1))
        centres = np.array([raw_N[part].mean() for part in parts])
        mass = np.array([len(part) for part in parts], np.float64)
        hits = np.array([accepted_N[part].sum() for part in parts])
        return cls._through(centres, _isotonic((hits + PRIOR / 2) / (mass + PRIOR), mass))

    @classmethod
    def logistic(cls, raw: Any, accepted: Any, weights: Any = None) -> Calibrator:
        """Maximum-likelihood log-odds: power * log-odds(raw) + offset."""
        raw_N, accepted_N, weights_N = _observations(raw, accepted, weights)
        odds_N = _log_odds(raw_N)
        power, offset = _likeliest(np.stack([odds_N, np.ones_like(odds_N)], 1), accepted_N, weights_N, [1.0, 0.0])
        if power < 0:  # acceptance falls with confidence: the best rising curve is flat
            power, (offset,) = 0.0, _likeliest(np.ones((len(odds_N), 1)), accepted_N, weights_N, [0.0])
        return cls._through(_sigmoid(LOG_ODDS), _sigmoid(power * LOG_ODDS + offset))

    @classmethod
    def _through(cls, raw: np.ndarray, probability: np.ndarray) -> Calibrator:
        """Through points rounded to six digits; of points that fall together the first is kept."""
        xs, first = np.unique(np.round(raw, 6), return_index=True)
        ys = np.round(np.clip(probability, EDGE, 1 - EDGE), 6)
        return cls(tuple(xs.tolist()), tuple(ys[first].tolist()))

    def to_json(self) -> dict[str, Any]:
        return {"raw": list(self.raw), "probability": list(self.probability)}

    @classmethod
    def from_json(cls, value: Any) -> Calibrator:
        return cls(tuple(map(float, value["raw"])), tuple(map(float, value["probability"])))


def _observations(raw: Any, accepted: Any, weights: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    raw_N, accepted_N = np.asarray(raw, np.float64), np.asarray(accepted, np.float64)
    weights_N = np.ones_like(raw_N) if weights is None else np.asarray(weights, np.float64)
    if not len(raw_N) or not len(raw_N) == len(accepted_N) == len(weights_N):
        raise ValueError(f"need as many outcomes as confidences; got {len(accepted_N)} and {len(raw_N)}")
    if not np.isfinite(raw_N).all():
        raise ValueError("a confidence is not a number")
    held = weights_N > 0
    return raw_N[held], accepted_N[held], weights_N[held]


def _steps(rising: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """Where the steps of `rising` start; one with too few observations joins the next (the last, the previous)."""
    least = max(MIN_STEP, float(mass.sum()) * STEP_SHARE)
    starts, held = [0], 0.0
    for i in range(len(rising)):
        if i and rising[i] - rising[i - 1] > 1e-12 and held >= least:  # less is rounding
            starts.append(i)
            held = 0.0
        held += mass[i]
    if held < least and len(starts) > 1:
        starts.pop()
    return np.array(starts)


def _isotonic(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    from scipy.optimize import isotonic_regression

    found: np.ndarray = isotonic_regression(values, weights=weights).x
    return found


def _likeliest(design_NF: np.ndarray, accepted_N: np.ndarray, weights_N: np.ndarray, start: list[float]) -> np.ndarray:
    """[F] Logistic regression with a weak pull towards `start`, worth about one observation."""
    from scipy.optimize import minimize

    start_F = np.array(start)
    total = weights_N.sum() + 1.0

    def loss_and_slope(at_F: np.ndarray) -> tuple[float, np.ndarray]:
        odds_N, off_F = design_NF @ at_F, at_F - start_F
        loss = (weights_N * (np.logaddexp(0.0, odds_N) - accepted_N * odds_N)).sum() + 0.5 * (off_F**2).sum()
        slope_F = design_NF.T @ (weights_N * (_sigmoid(odds_N) - accepted_N)) + off_F
        return loss / total, slope_F / total

    found_F: np.ndarray = minimize(loss_and_slope, start_F, jac=True, method="BFGS", options={"gtol": 1e-10}).x
    return found_F


def _log_odds(raw_N: np.ndarray) -> np.ndarray:
    clipped_N = np.clip(raw_N, EDGE, 1 - EDGE)
    odds_N: np.ndarray = np.log(clipped_N) - np.log1p(-clipped_N)
    return odds_N


def _sigmoid(odds_N: np.ndarray) -> np.ndarray:
    probs_N: np.ndarray = 1 / (1 + np.exp(-np.clip(odds_N, -30, 30)))
    return probs_N
