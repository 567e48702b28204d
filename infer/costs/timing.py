"""Times forward passes on this machine, and fits the formula of infer/costs/pass_costs.py to them.

A PassTimer can hold rows behind a context that it has not computed (the cache's content does not affect its speed), and
run a pass. The shapes are visited in rounds, each round in a new order, and a shape's time is the median over its
visits: on a busy machine all shapes slow down together.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from draftsmith.infer.contract.protocols import PassTimer
from draftsmith.infer.costs.pass_costs import PassCost, padded

if TYPE_CHECKING:
    import torch

# The least and the most rounds that count.
ROUNDS = (3, 9)
# Slots beyond the context that a timed row gets.
SPARE = 64

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class PassShape:
    """A pass to time: `rows` rows of `tokens` tokens each behind `context` committed ones."""

    rows: int
    tokens: int
    context: int


@dataclass(frozen=True, slots=True)
class TimedPass:
    """A pass and the seconds it took."""

    shape: PassShape
    seconds: float


def grid(rows: Iterable[int], tokens: Iterable[int], contexts: Iterable[int]) -> list[PassShape]:
    """Every combination, cheapest first."""
    tokens, contexts = list(tokens), list(contexts)
    shapes = {PassShape(r, q, c) for r in rows for q in tokens for c in contexts}
    return sorted(shapes, key=lambda shape: (shape.rows * shape.tokens, shape.rows * shape.context, shape.tokens))


def measure(
    timer: PassTimer,
    rows: Iterable[int],
    tokens: Iterable[int],
    contexts: Iterable[int],
    *,
    seconds: float = 60.0,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> list[TimedPass]:
    """Time every combination with `timer`, within `seconds`."""
    return measure_together({"": (timer, grid(rows, tokens, contexts))}, seconds=seconds, seed=seed, clock=clock)[""]


def measure_together(
    jobs: Mapping[str, tuple[PassTimer, Sequence[PassShape]]],
    *,
    seconds: float = 60.0,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> dict[str, list[TimedPass]]:
    """Time the passes of several timers in the same rounds, so that their ratios hold on a busy machine too.

    The first round is a warm-up, and shows how long a round takes; ValueError if there is no time for three more.
    """
    visits = [(name, shape) for name, (_, shapes) in jobs.items() for shape in shapes]
    taken: dict[tuple[str, PassShape], list[float]] = {visit: [] for visit in visits}
    order, began, slowest = random.Random(seed), clock(), 0.0
    try:
        for number in range(ROUNDS[1] + 1):
            started = clock()
            if number > ROUNDS[0] and started - began + slowest > seconds:
                break
            for done, (name, shape) in enumerate(order.sample(visits, len(visits)) if number else visits):
                taken[name, shape].append(_visit(jobs[name][0], shape, clock))
                if clock() - began > seconds and number <= ROUNDS[0]:
                    raise ValueError(
                        f"{seconds:g} s are too few: they ended after {number * len(visits) + done + 1} of "
                        f"{(ROUNDS[0] + 1) * len(visits)} passes; measure fewer shapes, or give more time (--seconds)"
                    )
            slowest = max(slowest, clock() - started)
    finally:
        for timer, _ in jobs.values():
            timer.close()
    return {
        name: [TimedPass(shape, median(taken[name, shape][1:])) for shape in shapes]
        for name, (_, shapes) in jobs.items()
    }


def _visit(timer: PassTimer, shape: PassShape, clock: Clock) -> float:
    """Seconds of one pass, after an uncounted one that brings weights and code into the caches."""
    timer.place(shape.rows, shape.context)
    timer.run(shape.tokens)
    _wait(timer.device)
    began = clock()
    timer.run(shape.tokens)
    _wait(timer.device)
    return clock() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def fit(points: Sequence[TimedPass], buckets: Sequence[int] = ()) -> PassCost:
    """Least relative error, with f non-decreasing and no negative slope.

    With a single context the slopes cannot be known: they are 0, and f holds for that context only.
    """
    if not points:
        raise ValueError("there are no measured passes to fit costs to")
    totals = sorted({_total(point.shape, buckets) for point in points})
    with_context = len({point.shape.context for point in points}) > 1
    design_MN = np.array([_features(point.shape, totals, buckets, with_context) for point in points])
    seconds_M = np.array([point.seconds for point in points])
    found_N = non_negative_fit(design_MN / seconds_M[:, None], np.ones(len(points)))
    f = np.cumsum(found_N[: len(totals)]).tolist()
    per_seen, per_pair = found_N[-2:] if with_context else (0.0, 0.0)
    return PassCost(totals, f, float(per_seen), float(per_pair), tuple(buckets))


def non_negative_fit(design_MN: np.ndarray, wanted_M: np.ndarray) -> np.ndarray:
    """[N] the x >= 0 that minimises |design x - wanted|. Columns are scaled, as they may differ by a factor of 1e9."""
    from scipy.optimize import nnls

    scale_N = np.linalg.norm(design_MN, axis=0)
    scale_N[scale_N == 0] = 1.0
    found_N: np.ndarray = nnls(design_MN / scale_N, wanted_M)[0] / scale_N
    return found_N


def _total(shape: PassShape, buckets: Sequence[int]) -> int:
    return shape.rows * padded(shape.tokens, buckets)


def _features(shape: PassShape, totals: Sequence[int], buckets: Sequence[int], with_context: bool) -> list[float]:
    """The terms of a pass's seconds: the rises of f up to its total, tokens of context, and attended pairs."""
    total, seen = _total(shape, buckets), shape.rows * shape.context
    rises = [float(total >= knot) for knot in totals]
    return [*rises, seen, seen * padded(shape.tokens, buckets)] if with_context else rises


def left_out(points: Sequence[TimedPass], buckets: Sequence[int] = ()) -> list[float]:
    """Relative errors of the fit on passes that it has not seen, leaving out one number of tokens at a time.

    The smallest and the largest number are always kept, since f extrapolates beyond them.
    """
    totals = sorted({_total(point.shape, buckets) for point in points})
    errors = []
    for total in totals[1:-1]:
        hidden = [point for point in points if _total(point.shape, buckets) == total]
        cost = fit([point for point in points if _total(point.shape, buckets) != total], buckets)
        for point in hidden:
            predicted = cost(point.shape.rows, point.shape.tokens, point.shape.context)
            errors.append(predicted / point.seconds - 1)
    return errors
