"""DReSD's calibration: how often a stored continuation is right, by similarity.

Measured when a store is built: for sampled positions of the store, the neighbours that a drafter would use, without
those from the same document, are compared with what really followed. Two rising curves result: `first`, for the next
token, and `later`, for each further token after a correct one. A curve has one point per bin of equally many
observations, made monotone and interpolated linearly.

Not infer/costs/calibrator.py's Calibrator: similarities may repeat in a stored curve, and the probabilities are capped
because their odds are used as weights.

Legend: N keys, K key dimensions, C neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from draftsmith.retrieval.dresd.index import search

# A drafter's defaults (drafter.py), for which the curves are measured.
NEIGHBOURS, NUM_DRAFTS, LEN_DRAFTS = 50, 10, 10
CALIBRATED_ON = 2_000

BINS = 20
MIN_PER_BIN = 25
# Bounds the weight (the odds) of a neighbour.
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
    """The curves of the first and of later tokens, and the number of observations behind each."""

    first: SimilarityCurve
    later: SimilarityCurve
    observations: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> SimilarityCalibration:
        curves = [
            SimilarityCurve(tuple(value[name]["similarity"]), tuple(value[name]["probability"]))
            for name in ("first", "later")
        ]
        first, later = value["observations"]
        return cls(curves[0], curves[1], (int(first), int(later)))


def fit_curve(similarity: Sequence[float] | np.ndarray, right: Sequence[bool] | np.ndarray) -> SimilarityCurve:
    """The rising curve of `right` over `similarity`. Every bin starts with one right and one wrong observation, so an
    empty curve is 0.5."""
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


def calibrate(
    index: Any, keys_NK: np.ndarray, tokens_N: np.ndarray, ends: np.ndarray, seed: int
) -> SimilarityCalibration:
    """How often the continuations of neighbours from other documents are right, by similarity."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(keys_NK))[:CALIBRATED_ON])
    first: list[tuple[float, bool]] = []
    later: list[tuple[float, bool]] = []
    # Twice as many, because neighbours from the query's own document are left out.
    count = min(2 * NEIGHBOURS, len(keys_NK))
    for start in range(0, len(chosen), 256):
        block = chosen[start : start + 256]
        sims_NC, offsets_NC = search(index, keys_NK[block], count)
        for query, sims_C, offsets_C in zip(block, sims_NC, offsets_NC):
            truth = _after(tokens_N, ends, int(query))
            if truth:
                for similarity, offset in _others(query, sims_C, offsets_C, tokens_N, ends):
                    right = [a == b for a, b in zip(truth, _after(tokens_N, ends, offset))]
                    judged = right[: right.index(False) + 1] if False in right else right
                    first.extend((similarity, one) for one in judged[:1])
                    later.extend((similarity, one) for one in judged[1:])
    curves = [fit_curve([seen[0] for seen in pairs], [seen[1] for seen in pairs]) for pairs in (first, later)]
    return SimilarityCalibration(curves[0], curves[1], (len(first), len(later)))


def _others(
    query: int, sims_C: np.ndarray, offsets_C: np.ndarray, tokens_N: np.ndarray, ends: np.ndarray
) -> list[tuple[float, int]]:
    """(similarity, offset) of the neighbours that a drafter would use if the query's document were not stored."""
    documents_C = np.searchsorted(ends, offsets_C, side="right")
    near_C = (offsets_C >= 0) & (documents_C != np.searchsorted(ends, query, side="right"))
    sims_C, offsets_C = sims_C[near_C][:NEIGHBOURS], offsets_C[near_C][:NEIGHBOURS]
    same_C = tokens_N[offsets_C] == tokens_N[query]
    return list(zip(sims_C[same_C][:NUM_DRAFTS].tolist(), offsets_C[same_C][:NUM_DRAFTS].tolist()))


def _after(tokens_N: np.ndarray, ends: np.ndarray, offset: int) -> list[int]:
    end = int(ends[np.searchsorted(ends, offset, side="right")])
    return [int(token) for token in tokens_N[offset + 1 : min(offset + 1 + LEN_DRAFTS, end)]]
