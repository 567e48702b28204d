"""Outcomes in, the results of a benchmark out: one dictionary per runner, the same keys for all.

A pair is a question that neither the runner nor plain decoding failed; all figures are over pairs. A question whose
plain answer loops is left out of the figures where `min_distinct` asks for it, never out of the count of equal answers.
How the outcomes came about is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

from draftsmith.infer.contract.trace import StepTrace
from draftsmith.infer.measure.answer_files import task_of
from draftsmith.infer.measure.bench import Measured, Outcome
from draftsmith.infer.measure.bootstrap import ratio_interval, speedup_interval
from draftsmith.infer.measure.equality import token_difference
from draftsmith.infer.measure.metrics import Totals, break_even, ratio, trace_figures
from draftsmith.infer.measure.repetition import distinct_share

Ids = Sequence[int | str]


def summarise(measured: Measured, *, min_distinct: float = 0.0, bandwidth: float | None = None) -> dict[str, Any]:
    """The results as JSON: drafters (plain decoding among them) and what was left out.

    `bandwidth`: the memory's bytes per second, where it was measured; then `limit_share` is the part of it in use.
    """
    distinct = _distinct(measured)
    everything = [question.id for question in measured.questions]
    kept = [question_id for question_id in everything if distinct.get(question_id, 1.0) >= min_distinct]
    drafters = {}
    for name in measured.outcomes:
        drafters[name] = figures(measured, name, kept) | _equality(measured, name, everything)
        drafters[name]["by_category"] = by_category(measured, name, kept)
        drafters[name]["limit_share"] = ratio(drafters[name]["bytes_per_s"] or 0.0, bandwidth or 0.0)
        if len(kept) < len(everything):
            drafters[name]["all_questions"] = figures(measured, name, everything)
    return {
        "drafters": drafters,
        "baseline": measured.baseline,
        "bandwidth": bandwidth,
        "questions": len(everything),
        "batch_size": measured.batch_size,
        "repeats": measured.repeats,
        "seed": measured.seed,
        "left_out": {
            "min_distinct": min_distinct,
            "questions": len(everything) - len(kept),
            "share": 1 - len(kept) / len(everything),
            "ids": [question_id for question_id in everything if question_id not in set(kept)],
        },
    }


def _distinct(measured: Measured) -> dict[int | str, float]:
    """The share of distinct 4-grams in plain's answer to each question that it answered."""
    answers = measured.outcomes[measured.baseline]
    return {
        question_id: distinct_share(outcomes[0].token_ids)
        for question_id, outcomes in answers.items()
        if not outcomes[0].error
    }


@dataclass(frozen=True, slots=True)
class RunTotals:
    """One runner's sums over all repeats of one question."""

    totals: Totals
    tokens: int
    wall_s: float

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> RunTotals:
        turns = [turn for outcome in outcomes for turn in outcome.turns]
        return cls(
            Totals.of(trace for outcome in outcomes for trace in outcome.traces),
            sum(len(turn.generation.token_ids) for turn in turns),
            sum(turn.wall_s for turn in turns),
        )


def pairs(measured: Measured, name: str, ids: Ids) -> list[int | str]:
    baseline = measured.baseline
    return [one for one in ids if not measured.error(name, one) and not measured.error(baseline, one)]


def figures(measured: Measured, name: str, ids: Ids) -> dict[str, Any]:
    """All figures of one runner over the pairs among `ids`; what cannot be known is None."""
    paired = pairs(measured, name, ids)
    outcomes = [outcome for one in paired for outcome in measured.outcomes[name][one]]
    traces: list[StepTrace] = [trace for outcome in outcomes for trace in outcome.traces]
    own = [RunTotals.of(measured.outcomes[name][one]) for one in paired]
    plain = [RunTotals.of(measured.outcomes[measured.baseline][one]) for one in paired]
    result = trace_figures(traces)
    result["end_to_end_tokens_per_s"] = ratio(sum(one.tokens for one in own), sum(one.wall_s for one in own))
    result |= _speedups(own, plain, measured.seed)
    result["accepted_length_interval"] = None
    if traces:
        committed, steps = [one.totals.committed for one in own], [one.totals.steps for one in own]
        result["accepted_length_interval"] = ratio_interval(committed, steps, seed=measured.seed)
    result["break_even"] = break_even(_total(own), _total(plain))
    turns = [turn.generation for outcome in outcomes for turn in outcome.turns]
    waits = [generation.first_s for generation in turns if generation.first_s > 0]
    result["ttft_s"] = ratio(sum(waits), len(waits))
    result["prefill_s"] = ratio(sum(generation.prefill_s for generation in turns), len(turns)) if traces else None
    result["tokens"] = sum(one.tokens for one in own)
    result["pairs"] = len(paired)
    return result


def _total(sums: Sequence[RunTotals]) -> Totals:
    return reduce(add, (one.totals for one in sums), Totals())


def _speedups(own: Sequence[RunTotals], plain: Sequence[RunTotals], seed: int) -> dict[str, Any]:
    """Ratios of sums with paired intervals. A runner without traces has an end-to-end speedup only, and says so."""
    traced = _total(own).steps > 0 and _total(plain).steps > 0
    end_to_end: list[list[float]] = [
        [one.tokens for one in own],
        [one.wall_s for one in own],
        [one.tokens for one in plain],
        [one.wall_s for one in plain],
    ]
    decode: list[list[float]] = [
        [one.totals.committed for one in own],
        [one.totals.decode_s for one in own],
        [one.totals.committed for one in plain],
        [one.totals.decode_s for one in plain],
    ]
    columns = decode if traced else end_to_end
    return {
        "speedup": _ratio_of_rates(columns),
        "speedup_interval": speedup_interval(*columns, seed=seed),
        "speedup_of": "decode" if traced else "end_to_end",
        "end_to_end_speedup": _ratio_of_rates(end_to_end),
        "end_to_end_speedup_interval": speedup_interval(*end_to_end, seed=seed),
    }


def _ratio_of_rates(columns: list[list[float]]) -> float | None:
    rate, base_rate = ratio(sum(columns[0]), sum(columns[1])), ratio(sum(columns[2]), sum(columns[3]))
    return None if rate is None or base_rate is None else ratio(rate, base_rate)


def _equality(measured: Measured, name: str, ids: Ids) -> dict[str, Any]:
    """Equal answers among all questions, errors among them; and for each other one where it parts from plain's."""
    differences, errors, equal = [], [], 0
    for question_id in ids:
        error = measured.error(name, question_id)
        if error:
            errors.append({"question_id": question_id, "error": error})
        elif not measured.error(measured.baseline, question_id):
            difference = _difference(measured, name, question_id)
            equal += difference is None
            differences += [] if difference is None else [{"question_id": question_id} | difference]
    return {
        "equal": equal,
        "total": len(ids),
        "differences": differences,
        "errors": len(errors),
        "error_list": errors,
        "unpaired": len(ids) - len(pairs(measured, name, ids)),
    }


def _difference(measured: Measured, name: str, question_id: int | str) -> dict[str, Any] | None:
    """The first difference between any repeat and plain's first answer; for plain itself: is it deterministic?"""
    plain = measured.outcomes[measured.baseline][question_id][0]
    for repeat, outcome in enumerate(measured.outcomes[name][question_id]):
        for turn, (base, other) in enumerate(zip(plain.token_ids, outcome.token_ids)):
            difference = token_difference(base, other)
            if difference is not None:
                return {"repeat": repeat, "turn": turn} | difference
    return None


def by_category(measured: Measured, name: str, ids: Ids) -> dict[str, dict[str, Any]]:
    """The figures that people compare by task, the eight categories of MT-Bench as one."""
    tasks: dict[str, list[int | str]] = {}
    wanted = set(ids)
    for question in measured.questions:
        if question.id in wanted:
            tasks.setdefault(task_of(question.category), []).append(question.id)
    names = (
        "tokens_per_s",
        "end_to_end_tokens_per_s",
        "speedup",
        "speedup_interval",
        "accepted_length",
        "hit_rate",
        "pairs",
    )
    rows = {}
    for task, its_ids in tasks.items():
        found = figures(measured, name, its_ids)
        equality = _equality(measured, name, its_ids)
        rows[task] = {key: found[key] for key in names} | {key: equality[key] for key in ("equal", "total")}
    return rows
