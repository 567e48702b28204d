"""A rising curve from a raw confidence to a probability, and ways to fit one to what was observed.

Isotonic: the rising steps that fit best, with a line from one step to the next; or the same over bins, where curves are
compared with one another. Logistic: the log-odds of the raw confidence, scaled by a temperature and shifted; two
numbers, for when there are few observations (arXiv 1706.04599 compares such fits). By hand, as no library that this
project depends on has them. No probability comes out 0 or 1: odds are used as weights, and no observation may weigh
without bound.

What is observed, and where curves are kept, is not known here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from draftsmith.infer.costs.isotonic import pool_adjacent_violators

# A step of the isotonic curve stands on at least so many observations, and on this share of all of them.
MIN_STEP, STEP_SHARE = 10.0, 1 / 200
# Bins of a binned curve, and the least that one holds.
BINS, MIN_BIN = 20, 40
# What every step is given before the first observation, half of it accepted.
PRIOR = 1.0
EDGE = 1e-6
# The log-odds at which a logistic curve gets a point.
LOG_ODDS = np.linspace(-9.0, 9.0, 73)


@dataclass(frozen=True, slots=True)
class Calibrator:
    """`raw` ascends, `probability` never falls and lies inside (0, 1). Constant beyond its ends."""

    raw: tuple[float, ...]
    probability: tuple[float, ...]

    def __post_init__(self) -> None:
        raw, probability = self.raw, self.probability
        if not raw or len(raw) != len(probability):
            raise ValueError(f"a curve needs as many probabilities as confidences, and has {len(probability)}")
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
        """Isotonic: `accepted` (yes or no, or a share) over `raw`, each with its weight."""
        raw_N, accepted_N, weights_N = _observations(raw, accepted, weights)
        xs, where_N = np.unique(raw_N, return_inverse=True)
        mass = np.bincount(where_N, weights_N)
        hits = np.bincount(where_N, weights_N * accepted_N)
        rising = np.array(pool_adjacent_violators((hits / mass).tolist(), mass.tolist()))
        starts = _steps(rising, mass)
        mass, hits = np.add.reduceat(mass, starts), np.add.reduceat(hits, starts)
        smoothed = (hits + PRIOR / 2) / (mass + PRIOR)
        steps = np.array(pool_adjacent_violators(smoothed.tolist(), mass.tolist()))
        ends = np.append(starts[1:] - 1, len(xs) - 1)
        return cls._through(np.stack([xs[starts], xs[ends]], 1).ravel(), np.repeat(steps, 2))

    @classmethod
    def binned(cls, raw: Any, accepted: Any) -> Calibrator:
        """Isotonic over bins of equally many observations, a line from centre to centre. The bins follow from `raw`
        alone, so that curves over the same `raw` may be subtracted from one another."""
        raw_N, accepted_N, _ = _observations(raw, accepted, None)
        order = np.argsort(raw_N, kind="stable")
        parts = np.array_split(order, max(min(BINS, len(order) // MIN_BIN), 1))
        centres = np.array([raw_N[part].mean() for part in parts])
        smoothed = [(accepted_N[part].sum() + PRIOR / 2) / (len(part) + PRIOR) for part in parts]
        return cls._through(centres, np.array(pool_adjacent_violators(smoothed, [len(part) for part in parts])))

    @classmethod
    def logistic(cls, raw: Any, accepted: Any, weights: Any = None) -> Calibrator:
        """The odds of the raw confidence to one power, times one factor, under which the observations are likeliest."""
        raw_N, accepted_N, weights_N = _observations(raw, accepted, weights)
        odds_N = _log_odds(raw_N)
        power, offset = _likeliest(np.stack([odds_N, np.ones_like(odds_N)], 1), accepted_N, weights_N, [1.0, 0.0])
        if power < 0:  # the less sure, the more accepted: nothing that may be said by a curve that rises
            power, (offset,) = 0.0, _likeliest(np.ones((len(odds_N), 1)), accepted_N, weights_N, [0.0])
        return cls._through(_sigmoid(LOG_ODDS), _sigmoid(power * LOG_ODDS + offset))

    @classmethod
    def _through(cls, raw: np.ndarray, probability: np.ndarray) -> Calibrator:
        """Points rounded to what a file shows; those that rounding makes one are one."""
        xs, first = np.unique(np.round(raw, 6), return_index=True)
        ys = np.round(np.clip(probability, EDGE, 1 - EDGE), 6)
        return cls(tuple(xs.tolist()), tuple(ys[first].tolist()))

    def to_json(self) -> dict[str, Any]:
        return {"raw": list(self.raw), "probability": list(self.probability)}

    @classmethod
    def from_json(cls, said: Any) -> Calibrator:
        return cls(tuple(map(float, said["raw"])), tuple(map(float, said["probability"])))


def _observations(raw: Any, accepted: Any, weights: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    raw_N, accepted_N = np.asarray(raw, np.float64), np.asarray(accepted, np.float64)
    weights_N = np.ones_like(raw_N) if weights is None else np.asarray(weights, np.float64)
    if not len(raw_N) or not len(raw_N) == len(accepted_N) == len(weights_N):
        raise ValueError(f"a curve is fitted to confidences and what became of them, and got {len(raw_N)} of them")
    if not np.isfinite(raw_N).all():
        raise ValueError("a confidence is not a number")
    held = weights_N > 0
    return raw_N[held], accepted_N[held], weights_N[held]


def _steps(rising: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """Where the steps of `rising` start; those that stand on too little are joined with what follows, or precedes."""
    least = max(MIN_STEP, float(mass.sum()) * STEP_SHARE)
    starts, held = [0], 0.0
    for i in range(len(rising)):
        if i and rising[i] > rising[i - 1] and held >= least:
            starts.append(i)
            held = 0.0
        held += mass[i]
    if held < least and len(starts) > 1:
        starts.pop()
    return np.array(starts)


def _likeliest(design_NF: np.ndarray, accepted_N: np.ndarray, weights_N: np.ndarray, start: list[float]) -> np.ndarray:
    """[F] Logistic regression by Newton's steps, held near `start` as if by one observation or so."""
    start_F = np.array(start)
    found_F = start_F.copy()

    def worth(at_F: np.ndarray) -> float:
        odds_N = design_NF @ at_F
        likely = (weights_N * (accepted_N * odds_N - np.logaddexp(0.0, odds_N))).sum()
        return float(likely - 0.5 * ((at_F - start_F) ** 2).sum())

    for _ in range(50):
        said_N = _sigmoid(design_NF @ found_F)
        slope_F = design_NF.T @ (weights_N * (accepted_N - said_N)) - (found_F - start_F)
        bend_FF = (design_NF.T * (weights_N * said_N * (1 - said_N))) @ design_NF + np.eye(len(start))
        step_F, size = np.linalg.solve(bend_FF, slope_F), 1.0
        while worth(found_F + size * step_F) < worth(found_F) and size > 1e-6:
            size /= 2
        found_F = found_F + size * step_F
        if float(np.abs(size * step_F).max()) < 1e-9:
            break
    return found_F


def _log_odds(raw_N: np.ndarray) -> np.ndarray:
    clipped_N = np.clip(raw_N, EDGE, 1 - EDGE)
    odds_N: np.ndarray = np.log(clipped_N) - np.log1p(-clipped_N)
    return odds_N


def _sigmoid(odds_N: np.ndarray) -> np.ndarray:
    probs_N: np.ndarray = 1 / (1 + np.exp(-np.clip(odds_N, -30, 30)))
    return probs_N
