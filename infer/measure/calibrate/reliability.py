"""Reliability: are candidates with confidence c accepted in a share c of the cases?

The expected calibration error is the mean gap between confidence and share accepted over bins of equal width, weighted
by the observations in each bin (arXiv 1706.04599).

Legend: N observations.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from draftsmith.infer.costs.calibrator import Calibrator
from draftsmith.infer.measure.calibrate.observations import Observations

BINS = 15


@dataclass(frozen=True, slots=True)
class Bin:
    """The mean confidence and the share accepted of `count` observations."""

    confidence: float
    share: float
    count: int


def bins(confidence_N: np.ndarray, accepted_N: np.ndarray, count: int = BINS) -> list[Bin]:
    """The non-empty bins; bin i is (i / count, (i + 1) / count], and 0 is in the first."""
    place_N = np.clip(np.ceil(np.asarray(confidence_N, np.float64) * count).astype(int) - 1, 0, count - 1)
    found = []
    for i in range(count):
        held_N = place_N == i
        if held_N.any():
            mean, share = float(np.mean(confidence_N[held_N])), float(np.mean(accepted_N[held_N]))
            found.append(Bin(mean, share, int(held_N.sum())))
    return found


def expected_calibration_error(confidence_N: np.ndarray, accepted_N: np.ndarray, count: int = BINS) -> float:
    if not len(confidence_N):
        raise ValueError("there is nothing to compare confidences with")
    gaps = [abs(one.confidence - one.share) * one.count for one in bins(confidence_N, accepted_N, count)]
    return sum(gaps) / len(confidence_N)


def check_plots() -> None:
    """Raise before anything is measured if matplotlib is not installed."""
    import matplotlib.figure  # noqa: F401


def draw_reliability(
    name: str, seen: Observations, calibrated_N: np.ndarray, curves: Sequence[Calibrator], path: Path
) -> None:
    """Plot the share accepted against confidence, raw and calibrated, and the number of candidates below.

    `curves` are the curve of all candidates and that of the likeliest.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.4), layout="constrained")
    above, below = figure.subplots(2, 2, height_ratios=(3, 1), sharex=True)
    for column, (first, title) in enumerate(((False, "all candidates"), (True, "each node's likeliest candidate"))):
        chosen_N = seen.rank_N == 0 if first else np.ones(len(seen), bool)
        plot, counts = above[column], below[column]
        plot.plot([0, 1], [0, 1], color="0.8", linewidth=1)
        curve = curves[column]
        plot.plot(curve.raw, curve.probability, color="0.5", linewidth=1, label="raw to calibrated")
        for label, confidence_N, colour in (("raw", seen.raw_N, "C1"), ("calibrated", calibrated_N, "C0")):
            _plot_one(plot, counts, label, confidence_N[chosen_N], seen.accepted_N[chosen_N], colour)
        plot.set(title=f"{name}: {title}", ylabel="share accepted", xlim=(0, 1), ylim=(0, 1))
        plot.legend(fontsize="small", loc="upper left")
        counts.set(xlabel="confidence", ylabel="candidates", yscale="log")
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png", dpi=110)
    os.replace(part, path)


def _plot_one(
    plot: Any, counts: Any, label: str, confidence_N: np.ndarray, accepted_N: np.ndarray, colour: str
) -> None:
    found = bins(confidence_N, accepted_N)
    error = expected_calibration_error(confidence_N, accepted_N)
    xs = [one.confidence for one in found]
    plot.plot(xs, [one.share for one in found], "o-", color=colour, label=f"{label} (ECE {error:.3f})")
    counts.plot(xs, [one.count for one in found], "o-", color=colour)
