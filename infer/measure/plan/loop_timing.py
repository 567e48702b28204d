"""The real loop timed with simulated drafts: the time of a step outside its passes, and checks of plan's predictions.

Plain decoding and every drafter decode the same prompts in turn, in a new order each round; speeds are over all rounds.
Only steps of the whole batch count, because a step with fewer rows has other costs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from draftsmith.infer.contract.protocols import Drafter, Target
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.contract.trace import Generation, StepTrace
from draftsmith.infer.costs.timing import non_negative_fit
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.drafters.simulated import SimulatedDrafter
from draftsmith.infer.engine.engine import CHUNK, Engine
from draftsmith.infer.measure.metrics import Totals

PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class LoopTiming:
    """`step_s`: the median step with a full draft; `outside_s`: its time outside the forward passes; `speedup`: decode
    tokens/s over plain decoding's."""

    accepted_length: float
    step_s: float
    outside_s: float
    speedup: float


def time_loop(
    target: Target,
    drafters: Mapping[str, SimulatedDrafter],
    *,
    rows: int,
    context: int,
    new_tokens: int,
    rounds: int = 5,
    seed: int = 0,
) -> dict[str, LoopTiming]:
    """Timings of "plain" and every drafter on `rows` random prompts of `context` tokens, decoded as one batch."""
    runs: dict[str, Drafter] = {PLAIN: Empty(), **drafters}
    for drafter in runs.values():
        drafter.bind(target)
    order, draw = random.Random(seed), random.Random(seed)
    prompts = [[draw.randrange(target.vocab_size) for _ in range(context)] for _ in range(rows)]

    def decode(drafter: Drafter) -> list[Generation]:
        made = [Row(f"{i}", list(ids), Settings(seed=seed), Stops(new_tokens)) for i, ids in enumerate(prompts)]
        return Engine(target, drafter, batch_size=rows, chunk=CHUNK * rows).run(made, strict=True)

    answers = {one.row: one.token_ids for one in decode(runs[PLAIN])}
    for drafter in drafters.values():
        drafter.learn(answers)
    taken: dict[str, list[StepTrace]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in order.sample(list(runs), len(runs)):
            traces = [trace for one in decode(runs[name]) for trace in one.traces]
            if number:  # the first round warms up
                taken[name] += traces
    return {name: loop_timing(traces, taken[PLAIN], rows) for name, traces in taken.items()}


def loop_timing(traces: Sequence[StepTrace], plain: Sequence[StepTrace], rows: int) -> LoopTiming:
    """The timing of a drafter from its traces and plain decoding's; only steps of all `rows` rows count."""
    traces = [trace for trace in traces if trace.batch == rows]
    mine, theirs = Totals.of(traces), Totals.of(trace for trace in plain if trace.batch == rows)
    whole = max(trace.nodes for trace in traces)
    steps = [trace for trace in traces if trace.nodes == whole]
    assert mine.accepted_length, "no step of the whole batch"
    assert mine.tokens_per_s
    assert theirs.tokens_per_s
    return LoopTiming(
        accepted_length=mine.accepted_length,
        step_s=median(step.seconds for step in steps),
        outside_s=median(step.seconds - step.target_forward_s - step.draft_forward_s for step in steps),
        speedup=mine.tokens_per_s / theirs.tokens_per_s,
    )


@dataclass(frozen=True, slots=True)
class Overhead:
    """Seconds of a step outside its passes: per step, per row, per draft pass, and per draft pass and row."""

    step: float
    row: float
    draft_pass: float
    draft_pass_row: float

    def __call__(self, rows: int, passes: int) -> float:
        return self.step + self.row * rows + passes * (self.draft_pass + self.draft_pass_row * rows)

    @classmethod
    def fit(cls, points: Sequence[tuple[int, int, float]]) -> Overhead:
        """From (rows, draft passes, seconds outside the passes); noise may make the seconds negative."""
        design_MN = np.array([[1.0, rows, passes, passes * rows] for rows, passes, _ in points])
        return cls(*map(float, non_negative_fit(design_MN, np.array([left for _, _, left in points]))))


def overhead(
    target: Target,
    make_draft: Callable[[int], Drafter],
    around_s: Callable[[int, int], float],
    *,
    batch_sizes: Sequence[int],
    lengths: Sequence[int],
    context: int,
    new_tokens: int = 24,
    rounds: int = 3,
) -> Overhead:
    """What the loop adds to its passes, from drafts of each of `lengths` at each of `batch_sizes`.

    `around_s(rows, length)` is the part of this time that the passes' own costs already include; length 0 is a plain
    step. Time outside the models is measured within each step; a difference of whole steps would drown in noise.
    """
    left = []
    for rows in batch_sizes:
        drafters = {str(length): SimulatedDrafter(make_draft(length), acceptance=0.5) for length in lengths}
        found = time_loop(target, drafters, rows=rows, context=context, new_tokens=new_tokens, rounds=rounds)
        for name, timing in found.items():
            length = 0 if name == PLAIN else int(name)
            left.append((rows, length, timing.outside_s - around_s(rows, length)))
    return Overhead.fit(left)
