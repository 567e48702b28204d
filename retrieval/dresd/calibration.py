"""From similarity to a probability: how often a stored continuation goes on as the text does.

Measured when a store is built: for positions of the store itself, with their own document left out, the neighbours that
pass the filtering token are compared with what really followed. Two rising curves come of it: `first`, for the next
token, and `later`, for each further token after one that was right. A curve is a handful of points, one per bin of
equally many observations, made monotone (pool adjacent violators) and read by linear interpolation.

What a neighbour is, and how one is found, is not known here: the observations are handed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BINS = 20
MIN_PER_BIN = 25
# Odds are used as weights: no observation may weigh without bound.
HIGHEST = 0.98


@dataclass(frozen=True, slots=True)
class SimilarityCurve:
    """A rising curve through (similarity, probability); constant beyond its ends."""

    similarity: tuple[float, ...]
    probability: tuple[float, ...]

    def __call__(self, similarity: np.ndarray) -> np.ndarray:
        return np.interp(similarity, self.similarity, self.probability)


@dataclass(frozen=True, slots=True)
class SimilarityCalibration:
    """The curves of the first token and of later ones, and how many observations they stand on."""

    first: SimilarityCurve
    later: SimilarityCurve
    observations: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        return {
            "first": {"similarity": self.first.similarity, "probability": self.first.probability},
            "later": {"similarity": self.later.similarity, "probability": self.later.probability},
            "observations": self.observations,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> SimilarityCalibration:
        curves = [
            SimilarityCurve(tuple(value[name]["similarity"]), tuple(value[name]["probability"]))
            for name in ("first", "later")
        ]
        first, later = value["observations"]
        return cls(curves[0], curves[1], (int(first), int(later)))


def fit_curve(similarity: Sequence[float] | np.ndarray, right: Sequence[bool] | np.ndarray) -> SimilarityCurve:
    """The rising curve of `right` over `similarity`. Every bin starts from one right and one wrong observation, so
    without any the curve says 0.5."""
    from scipy.optimize import isotonic_regression

    order = np.argsort(np.asarray(similarity, dtype=np.float64), kind="stable")
    sims, hits = np.asarray(similarity, dtype=np.float64)[order], np.asarray(right, dtype=np.float64)[order]
    bins = max(min(BINS, len(sims) // MIN_PER_BIN), 1)
    points = [(0.0, 0.5, 2.0)] if not len(sims) else []
    for chosen in np.array_split(np.arange(len(sims)), bins) if len(sims) else ():
        points.append((float(sims[chosen].mean()), (hits[chosen].sum() + 1) / (len(chosen) + 2), len(chosen) + 2.0))
    means = isotonic_regression([point[1] for point in points], weights=[point[2] for point in points]).x
    return SimilarityCurve(
        tuple(round(point[0], 6) for point in points), tuple(round(min(float(mean), HIGHEST), 6) for mean in means)
    )
