"""One probability from several sources: what each says about a token, pooled by online logistic regression.

A source that has candidates below a node either names a token or misses it. Where a single source has any, its own
confidence is kept. Where several have, the log-odds of their confidences are added with learned weights; a miss counts
against a token, more so where the source leaves little probability to what it did not name. Learning is full
information (arXiv 2510.20064): every source is graded at every node that the committed text reached, whether or not its
candidates were verified. One regression per band of temperatures, refitted by one Newton step after every step of
decoding; it starts at weights that trust agreement a little.

Legend: N observations, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, log, log1p
from typing import NamedTuple

import numpy as np

# Features of a source: it names the token (1, log-odds of its confidence, rank), or misses it (1, log of what is left).
PER_SOURCE = 5
START = (0.15, 0.6, 0.0, -0.5, 0.4)
# The start counts like this many observations of each feature, and returns with this share per step.
PRIOR_WEIGHT = 8.0
FORGOTTEN = 0.005
# Confidences are kept this far from 0 and 1, and what a source leaves to other tokens from 0.
EDGE = 0.003
MOST_RANK = 4


class Naming(NamedTuple):
    """What one source says about a token that it names: the rank among its candidates, its probability, its name."""

    rank: int
    confidence: float
    source: str


class Pool:
    """The regression of one band of temperatures, over `sources` sources."""

    def __init__(self, sources: int) -> None:
        self._start_F = np.array(START * sources)
        self._least_FF = PRIOR_WEIGHT * np.eye(len(self._start_F))
        self._certain_FF = self._least_FF.copy()
        self._seen: list[list[float]] = []
        self._accepted: list[bool] = []
        self.weights_F = self._start_F.copy()
        self._weights: list[float] = self.weights_F.tolist()

    def misses(self, left: Mapping[int, float]) -> dict[int, float]:
        """What each source with candidates below a node adds to the log-odds of a token that it does not name there:
        `left[s]` is what source s leaves to such tokens."""
        weights = self._weights
        return {
            source: weights[PER_SOURCE * source + 3] + weights[PER_SOURCE * source + 4] * log(max(rest, EDGE))
            for source, rest in left.items()
        }

    def probability(self, misses: Mapping[int, float], named: Mapping[int, Naming]) -> float:
        """That a token is accepted, given its parent: `misses` of that parent; `named[s]` is what source s says about
        this token."""
        odds, weights = sum(misses.values()), self._weights
        for source, naming in named.items():
            at = PER_SOURCE * source
            odds += weights[at] + weights[at + 1] * _log_odds(naming.confidence) - misses[source]
            odds += weights[at + 2] * min(naming.rank, MOST_RANK)
        return _sigmoid(odds)

    def observe(self, left: Mapping[int, float], named: Mapping[int, Naming], accepted: bool) -> None:
        """Grade the sources by whether this token was committed."""
        features = [0.0] * len(self._weights)
        for source, rest in left.items():
            at = PER_SOURCE * source
            naming = named.get(source)
            if naming is None:
                features[at + 3 : at + 5] = 1.0, log(max(rest, EDGE))
            else:
                features[at : at + 3] = 1.0, _log_odds(naming.confidence), min(naming.rank, MOST_RANK)
        self._seen.append(features)
        self._accepted.append(accepted)

    def refit(self) -> None:
        """One Newton step with what was observed since the last one."""
        if not self._seen:
            return
        seen_NF = np.array(self._seen)
        expected_N = 1 / (1 + np.exp(-np.clip(seen_NF @ self.weights_F, -30.0, 30.0)))
        slope_F = (np.array(self._accepted) - expected_N) @ seen_NF
        curve_FF = (expected_N * (1 - expected_N) * seen_NF.T) @ seen_NF
        back_FF = FORGOTTEN * self._least_FF
        self._certain_FF = (1 - FORGOTTEN) * self._certain_FF + back_FF + curve_FF
        slope_F += back_FF @ (self._start_F - self.weights_F)
        self.weights_F = self.weights_F + np.linalg.solve(self._certain_FF, slope_F)
        self._weights = self.weights_F.tolist()
        self._seen, self._accepted = [], []


def _log_odds(probability: float) -> float:
    clipped = min(max(probability, EDGE), 1 - EDGE)
    return log(clipped) - log1p(-clipped)


def _sigmoid(odds: float) -> float:
    return 1 / (1 + exp(-min(max(odds, -30.0), 30.0)))
