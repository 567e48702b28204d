"""The real loop timed with drafts that are told: what a step takes outside its passes, and whether predictions hold.

Plain decoding and every drafter decode the same prompts, next to one another and in a new order each round; speeds are
those of all rounds together. Only steps of the whole batch count: once some rows have left, a step is another one. How
costs are fitted is not known here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from draftsmith.infer.contract import Drafter, Target
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.drafters.rehearsed import Rehearsed
from draftsmith.infer.generate import generate
from draftsmith.infer.measure.least_squares import non_negative
from draftsmith.infer.measure.metrics import Totals
from draftsmith.infer.row import Row, Stops
from draftsmith.infer.settings import Settings
from draftsmith.infer.trace import Generation, StepTrace

PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Heard:
    """`step_s` is the median step with a whole draft; `speedup` the ratio of decode tokens/s to plain decoding."""

    accepted_length: float
    step_s: float
    speedup: float


def rehearse(
    target: Target,
    drafters: Mapping[str, Rehearsed],
    *,
    rows: int,
    context: int,
    new_tokens: int,
    rounds: int = 5,
    seed: int = 0,
) -> dict[str, Heard]:
    """Every drafter, and "plain", on `rows` random prompts of `context` tokens, decoded together."""
    runs: dict[str, Drafter] = {PLAIN: Empty(), **drafters}
    for drafter in runs.values():
        drafter.bind(target)
    order, prompts = random.Random(seed), _prompts(target, rows, context, seed)

    def decode(drafter: Drafter) -> list[Generation]:
        made = [Row(f"{i}", list(ids), Settings(seed=seed), Stops(new_tokens)) for i, ids in enumerate(prompts)]
        return generate(target, drafter, made, batch_size=rows)

    answers = {one.row: one.token_ids for one in decode(runs[PLAIN])}
    for drafter in drafters.values():
        drafter.learn(answers)
    taken: dict[str, list[StepTrace]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in order.sample(list(runs), len(runs)):
            traces = [trace for one in decode(runs[name]) for trace in one.traces if trace.batch == rows]
            if number:
                taken[name] += traces
    return {name: _heard(traces, taken[PLAIN]) for name, traces in taken.items()}


def _heard(traces: Sequence[StepTrace], plain: Sequence[StepTrace]) -> Heard:
    whole = max(trace.nodes for trace in traces)
    mine, theirs = Totals.of(traces), Totals.of(plain)
    assert mine.accepted_length and mine.tokens_per_s and theirs.tokens_per_s
    return Heard(
        accepted_length=mine.accepted_length,
        step_s=median(trace.seconds for trace in traces if trace.nodes == whole),
        speedup=mine.tokens_per_s / theirs.tokens_per_s,
    )


def _prompts(target: Target, rows: int, context: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(target.vocab_size) for _ in range(context)] for _ in range(rows)]


@dataclass(frozen=True, slots=True)
class Overhead:
    """Seconds of a step outside its passes: of every step and row, and of every pass and row of a draft model."""

    step: float
    row: float
    draft_pass: float
    draft_pass_row: float

    def __call__(self, rows: int, passes: int) -> float:
        return self.step + self.row * rows + passes * (self.draft_pass + self.draft_pass_row * rows)

    @classmethod
    def fit(cls, heard: Sequence[tuple[int, int, float]]) -> Overhead:
        """From (rows, draft passes, seconds left) of some steps. What is left may come out below zero in noise."""
        design_MN = np.array([[1.0, rows, passes, passes * rows] for rows, passes, _ in heard])
        return cls(*map(float, non_negative(design_MN, np.array([left for _, _, left in heard]))))


def overhead(
    target: Target,
    make_draft: Callable[[int], Drafter],
    passes_s: Callable[[int, int, float], float],
    *,
    batch_sizes: Sequence[int],
    lengths: Sequence[int],
    context: int,
    new_tokens: int = 24,
    rounds: int = 3,
) -> tuple[Overhead, dict[str, Any]]:
    """What the loop adds to its passes, from a draft made for each of `lengths` at each of `batch_sizes`.

    `passes_s(rows, length, context)` is what the costs say of the passes of such a step; length 0 is a plain one.
    """
    left, shown = [], {}
    for rows in batch_sizes:
        drafters = {str(length): Rehearsed(make_draft(length), acceptance=0.5) for length in lengths}
        heard = rehearse(target, drafters, rows=rows, context=context, new_tokens=new_tokens, rounds=rounds)
        for name, one in heard.items():
            length = 0 if name == PLAIN else int(name)
            rest = one.step_s - passes_s(rows, length, context + new_tokens / 2)
            left.append((rows, length, rest))
            shown[f"{rows} rows, {length} tokens"] = rest
    return Overhead.fit(left), shown
