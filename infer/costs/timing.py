"""Times forward passes on this machine, and fits the formula of infer/costs/pass_costs.py to them.

A PassTimer can hold rows behind a context that it has not computed (the cache's content does not affect its speed), and
run a pass. The shapes are visited in rounds, each round in a new order, and a shape's time is the median over its
visits: on a busy machine all shapes slow down together. The longest passes, which would take most of the time, are
visited less often.
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
# In a longer pass, filling the processor's caches is lost in the noise.
LONG_S = 0.2

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


# The name of a timer and the pass that it times.
Visit = tuple[str, PassShape]


def grid(rows: Iterable[int], tokens: Iterable[int], contexts: Iterable[int]) -> list[PassShape]:
    """Every combination, cheapest first."""
    tokens, contexts = list(tokens), list(contexts)
    shapes = {PassShape(r, q, c) for r in rows for q in tokens for c in contexts}
    return sorted(shapes, key=lambda shape: (shape.rows * shape.tokens, shape.rows * shape.context, shape.tokens))


def measure_together(
    jobs: Mapping[str, tuple[PassTimer, Sequence[PassShape]]],
    *,
    seconds: float = 60.0,
    seed: int = 0,
    clock: Clock = time.perf_counter,
    progress: Callable[[float | None], None] | None = None,
) -> dict[str, list[TimedPass]]:
    """Time the passes of several timers in the same rounds, so that their ratios hold on a busy machine too.

    The first round is a warm-up, and shows how long every pass takes; ValueError if there is no time for three more.
    After those, each round leaves out the passes that had their share of time: medians of long passes need fewer.
    `progress` is called after every pass, with the seconds left as far as known (None in the first round).
    """
    visits = [(name, shape) for name, (_, shapes) in jobs.items() for shape in shapes]
    taken: dict[Visit, list[float]] = {one: [] for one in visits}
    order, began, done = random.Random(seed), clock(), 0
    rounds = [visits]
    try:
        for number in range(ROUNDS[1] + 1):
            if number == 1:
                rounds += _rounds_of({one: times[0] for one, times in taken.items()})
            ahead = [_run_seconds(median(taken[one])) for one in rounds[number]] if number else []
            if number > ROUNDS[0] and clock() - began + sum(ahead) > seconds:
                break
            shuffled = order.sample(rounds[number], len(rounds[number])) if number else visits
            for one in shuffled:
                taken[one].append(visit(jobs[one[0]][0], one[1], clock))
                done += 1
                if clock() - began > seconds and number <= ROUNDS[0]:
                    raise ValueError(
                        f"{seconds:g} s are too few: they ended after {done} of {(ROUNDS[0] + 1) * len(visits)} "
                        "passes; measure fewer shapes, or give more time (--seconds)"
                    )
                if progress is not None:
                    progress(_left(rounds, taken, seconds - (clock() - began)) if number else None)
    finally:
        for timer, _ in jobs.values():
            timer.close()
    return {
        name: [TimedPass(shape, median(taken[name, shape][1:])) for shape in shapes]
        for name, (_, shapes) in jobs.items()
    }


def expected_seconds(seconds: Mapping[Visit, float]) -> tuple[float, float]:
    """How long `measure_together` takes for passes of these seconds: at least, and if nothing limits it."""
    rounds = [list(seconds), *_rounds_of(seconds)]
    taken = [sum(_run_seconds(seconds[one]) for one in some) for some in rounds]
    return sum(taken[: ROUNDS[0] + 1]), sum(taken)


def _rounds_of(seconds: Mapping[Visit, float]) -> list[list[Visit]]:
    """The passes of each counted round. One that takes up to the median time is in all, a longer one in fewer."""
    share = ROUNDS[1] * median(seconds.values())
    counts = {one: min(max(int(share / taken), ROUNDS[0]), ROUNDS[1]) for one, taken in seconds.items()}
    return [[one for one in seconds if number < counts[one]] for number in range(ROUNDS[1])]


def _run_seconds(taken: float) -> float:
    """How long a visit to a pass of `taken` seconds takes."""
    return taken if taken > LONG_S else 2 * taken


def _left(rounds: Sequence[Sequence[Visit]], taken: Mapping[Visit, list[float]], limit: float) -> float:
    """Seconds until all rounds are done, as every pass took so far, but no more than `limit`."""
    counts = {one: sum(one in some for some in rounds) - len(times) for one, times in taken.items()}
    return min(sum(count * _run_seconds(median(taken[one])) for one, count in counts.items()), max(limit, 0.0))


def visit(timer: PassTimer, shape: PassShape, clock: Clock) -> float:
    """Seconds of one pass. A short one runs twice, and the first, which fills the caches, does not count."""
    timer.place(shape.rows, shape.context)
    for _ in range(2):
        _wait(timer.device)
        began = clock()
        timer.run(shape.tokens)
        _wait(timer.device)
        taken = clock() - began
        if taken > LONG_S:
            break
    return taken


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def fit(points: Sequence[TimedPass], buckets: Sequence[int] = ()) -> PassCost:
    """Least relative error, with f non-decreasing and no negative slope.

    With a single context its slopes cannot be known: they are 0, and f holds for that context only. The same for a
    single number of rows.
    """
    if not points:
        raise ValueError("there are no measured passes to fit costs to")
    totals = sorted({_total(point.shape, buckets) for point in points})
    with_context = len({point.shape.context for point in points}) > 1
    with_rows = len({point.shape.rows for point in points}) > 1
    design_MN = np.array([_features(point.shape, totals, buckets) for point in points])
    design_MN[:, len(totals) :] *= [with_rows, with_context, with_context]
    seconds_M = np.array([point.seconds for point in points])
    found_N = non_negative_fit(design_MN / seconds_M[:, None], np.ones(len(points)))
    f = np.cumsum(found_N[: len(totals)]).tolist()
    per_row, per_seen, per_pair = found_N[len(totals) :].tolist()
    return PassCost(totals, f, per_seen, per_pair, tuple(buckets), per_row)


def non_negative_fit(design_MN: np.ndarray, wanted_M: np.ndarray) -> np.ndarray:
    """[N] the x >= 0 that minimises |design x - wanted|. Columns are scaled, as they may differ by a factor of 1e9."""
    from scipy.optimize import nnls

    scale_N = np.linalg.norm(design_MN, axis=0)
    scale_N[scale_N == 0] = 1.0
    found_N: np.ndarray = nnls(design_MN / scale_N, wanted_M)[0] / scale_N
    return found_N


def _total(shape: PassShape, buckets: Sequence[int]) -> int:
    return padded(shape.rows * shape.tokens, buckets)


def _features(shape: PassShape, totals: Sequence[int], buckets: Sequence[int]) -> list[float]:
    """The terms of a pass's seconds: the rises of f up to its total, rows, tokens of context, and attended pairs."""
    total, seen = _total(shape, buckets), shape.rows * shape.context
    rises = [float(total >= knot) for knot in totals]
    return [*rises, shape.rows, seen, seen * shape.tokens]


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
            predicted = cost.even(point.shape.rows, point.shape.tokens, point.shape.context)
            errors.append(predicted / point.seconds - 1)
    return errors
