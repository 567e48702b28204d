"""How long forward passes take on this machine, and the formula of infer/costs/pass_costs.py fitted to it.

What is timed is a *lab*: something that can stand behind a context without having computed it (what a cache holds does
not matter to its speed) and run a pass. Points are visited in rounds, in a new order each, and a point's time is the
median over its visits: a machine that is busy for a while slows all points, not one of them.

This module does not know drafters or plans. What a step does outside its passes is measured by those who know the step.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from draftsmith.infer.costs.pass_costs import PassCost, padded

if TYPE_CHECKING:
    import torch

# Fewer visits than these give no median worth the name.
ROUNDS = (3, 9)
SPARE = 64

Clock = Callable[[], float]


class PassTimer(Protocol):
    """Something whose passes can be timed. `buckets`: as of a Target."""

    @property
    def buckets(self) -> Sequence[int]: ...

    @property
    def device(self) -> torch.device: ...

    def place(self, rows: int, context: int) -> None:
        """Stand `rows` rows behind `context` committed tokens, without computing them."""
        ...

    def run(self, tokens: int) -> None:
        """One pass of `tokens` tokens per row, as decoding makes it; nothing of it is committed."""
        ...

    def close(self) -> None:
        """Let go of the rows."""
        ...


@dataclass(frozen=True, slots=True)
class PassShape:
    """A pass to be timed: `rows` rows of `tokens` tokens each behind `context` committed ones."""

    rows: int
    tokens: int
    context: int


@dataclass(frozen=True, slots=True)
class TimedPass:
    """A pass and the seconds it took."""

    ask: PassShape
    seconds: float


def grid(rows: Iterable[int], tokens: Iterable[int], contexts: Iterable[int]) -> list[PassShape]:
    """Every combination, cheapest first."""
    tokens, contexts = list(tokens), list(contexts)
    asks = {PassShape(r, q, c) for r in rows for q in tokens for c in contexts}
    return sorted(asks, key=lambda ask: (ask.rows * ask.tokens, ask.rows * ask.context, ask.tokens))


def measure(
    lab: PassTimer,
    rows: Iterable[int],
    tokens: Iterable[int],
    contexts: Iterable[int],
    *,
    seconds: float = 60.0,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> list[TimedPass]:
    """The points of `lab` for every combination; `seconds` is the time that it may take."""
    return measure_together({"": (lab, grid(rows, tokens, contexts))}, seconds=seconds, seed=seed, clock=clock)[""]


def measure_together(
    jobs: Mapping[str, tuple[PassTimer, Sequence[PassShape]]],
    *,
    seconds: float = 60.0,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> dict[str, list[TimedPass]]:
    """Points of several pass_timers, all timed next to one another, so that their ratios hold on a busy machine too.

    The first round warms up and tells how long a round takes; ValueError where the time does not allow three.
    """
    visits = [(name, ask) for name, (_, asks) in jobs.items() for ask in asks]
    taken: dict[tuple[str, PassShape], list[float]] = {visit: [] for visit in visits}
    order, began, slowest = random.Random(seed), clock(), 0.0
    try:
        for number in range(ROUNDS[1] + 1):
            started = clock()
            if number > ROUNDS[0] and started - began + slowest > seconds:
                break
            for done, (name, ask) in enumerate(order.sample(visits, len(visits)) if number else visits):
                taken[name, ask].append(_visit(jobs[name][0], ask, clock))
                if clock() - began > seconds and number <= ROUNDS[0]:
                    raise ValueError(
                        f"{seconds:g} s are too few: they were over after {number * len(visits) + done + 1} of "
                        f"{(ROUNDS[0] + 1) * len(visits)} visits; measure fewer points, or give more time (--seconds)"
                    )
            slowest = max(slowest, clock() - started)
    finally:
        for lab, _ in jobs.values():
            lab.close()
    return {name: [TimedPass(ask, median(taken[name, ask][1:])) for ask in asks] for name, (_, asks) in jobs.items()}


def _visit(lab: PassTimer, ask: PassShape, clock: Clock) -> float:
    """Seconds of one pass; the one before it, not counted, brings weights and code where decoding would find them."""
    lab.place(ask.rows, ask.context)
    lab.run(ask.tokens)
    _wait(lab.device)
    began = clock()
    lab.run(ask.tokens)
    _wait(lab.device)
    return clock() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def fit(points: Sequence[TimedPass], buckets: Sequence[int] = ()) -> PassCost:
    """The formula of PassCost with the least relative error: f non-decreasing, no slope negative.

    With one context alone the slopes are not to be known: they stay 0, and f holds for that context.
    """
    if not points:
        raise ValueError("there are no measured passes to fit costs to")
    totals = sorted({_total(point.ask, buckets) for point in points})
    with_context = len({point.ask.context for point in points}) > 1
    design_MN = np.array([_features(point.ask, totals, buckets, with_context) for point in points])
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


def _total(ask: PassShape, buckets: Sequence[int]) -> int:
    return ask.rows * padded(ask.tokens, buckets)


def _features(ask: PassShape, totals: Sequence[int], buckets: Sequence[int], with_context: bool) -> list[float]:
    """What a pass's seconds are a sum of: the rises of f up to it, what is seen, and seen pairs."""
    total, seen = _total(ask, buckets), ask.rows * ask.context
    rises = [float(total >= knot) for knot in totals]
    return [*rises, seen, seen * padded(ask.tokens, buckets)] if with_context else rises


def left_out(points: Sequence[TimedPass], buckets: Sequence[int] = ()) -> list[float]:
    """The relative errors of passes that the fit has not seen: those of one number of tokens are left out at a time.

    Only between the smallest and the largest number: beyond, the formula carries on a slope.
    """
    totals = sorted({_total(point.ask, buckets) for point in points})
    errors = []
    for total in totals[1:-1]:
        hidden = [point for point in points if _total(point.ask, buckets) == total]
        cost = fit([point for point in points if _total(point.ask, buckets) != total], buckets)
        for point in hidden:
            said = cost(point.ask.rows, point.ask.tokens, point.ask.context)
            errors.append(said / point.seconds - 1)
    return errors


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Whose costs these are: a file of another machine says nothing about this one."""
    import torch

    from draftsmith.infer.files.provenance import hardware

    facts = hardware()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else facts["cpu"]["model"]
    return {
        "device": device.type,
        "name": name,
        "cores": facts["cpu"]["cores_usable"],
        "threads": facts["cpu"]["torch_threads"],
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
    }
