"""The results of a benchmark from its outcomes: one dictionary per runner, the same keys for all.

A pair is a question that neither the runner nor plain decoding failed; all figures are over pairs. With `min_distinct`,
questions whose plain answer loops are left out of the figures, but not out of the count of equal answers.
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
from draftsmith.infer.measure.bootstrap import Interval, ratio_interval, speedup_interval
from draftsmith.infer.measure.compare import token_difference
from draftsmith.infer.measure.metrics import Totals, break_even, distinct_share, ratio, trace_figures

Ids = Sequence[int | str]

BY_CATEGORY = (
    "tokens_per_s", "end_to_end_tokens_per_s", "speedup", "speedup_interval", "accepted_length", "hit_rate", "pairs",
)  # fmt: skip


def summarise(measured: Measured, *, min_distinct: float = 0.0, bandwidth: float | None = None) -> dict[str, Any]:
    """The results as JSON: drafters (plain decoding among them) and what was left out.

    `bandwidth`: the memory's bytes per second, if measured; `limit_share` is the share of it in use.
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
    """The share of distinct 4-grams in each of plain's answers."""
    answers = measured.outcomes[measured.baseline]
    return {
        question_id: distinct_share(outcomes[0].token_ids)
        for question_id, outcomes in answers.items()
        if not outcomes[0].error
    }


@dataclass(frozen=True, slots=True)
class RunTotals:
    """One runner's sums over all repeats of one question. `decode` and `end_to_end` are (tokens, seconds)."""

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

    @property
    def decode(self) -> tuple[float, float]:
        return self.totals.committed, self.totals.decode_s

    @property
    def end_to_end(self) -> tuple[float, float]:
        return self.tokens, self.wall_s


def pairs(measured: Measured, name: str, ids: Ids) -> list[int | str]:
    baseline = measured.baseline
    return [one for one in ids if not measured.error(name, one) and not measured.error(baseline, one)]


def figures(measured: Measured, name: str, ids: Ids) -> dict[str, Any]:
    """All figures of one runner over the pairs among `ids`; None for those that cannot be computed."""
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
    """Speedups with paired intervals. A runner without traces has an end-to-end speedup only; `speedup_of` tells."""
    traced = _total(own).steps > 0 and _total(plain).steps > 0
    end_to_end = _speedup([one.end_to_end for one in own], [one.end_to_end for one in plain], seed)
    decode = _speedup([one.decode for one in own], [one.decode for one in plain], seed) if traced else end_to_end
    return {
        "speedup": decode[0],
        "speedup_interval": decode[1],
        "speedup_of": "decode" if traced else "end_to_end",
        "end_to_end_speedup": end_to_end[0],
        "end_to_end_speedup_interval": end_to_end[1],
    }


def _speedup(
    own: Sequence[tuple[float, float]], plain: Sequence[tuple[float, float]], seed: int
) -> tuple[float | None, Interval]:
    """The ratio of two rates, each sum(tokens) / sum(seconds) over the questions, and its interval."""
    columns = [[each[i] for each in side] for side in (own, plain) for i in (0, 1)]
    tokens, seconds, base_tokens, base_seconds = map(sum, columns)
    return ratio(ratio(tokens, seconds), ratio(base_tokens, base_seconds)), speedup_interval(*columns, seed=seed)


def _equality(measured: Measured, name: str, ids: Ids) -> dict[str, Any]:
    """Equal answers and errors among all questions, and the first difference from plain's answer in each other one."""
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
        "drawn": name in measured.drawn,
        "differences": differences,
        "errors": len(errors),
        "error_list": errors,
        "unpaired": len(ids) - len(pairs(measured, name, ids)),
    }


def _difference(measured: Measured, name: str, question_id: int | str) -> dict[str, Any] | None:
    """The first difference of any repeat from plain's first answer; for plain itself, a check of determinism."""
    plain = measured.outcomes[measured.baseline][question_id][0]
    for repeat, outcome in enumerate(measured.outcomes[name][question_id]):
        for turn, (base, other) in enumerate(zip(plain.token_ids, outcome.token_ids)):
            difference = token_difference(base, other)
            if difference is not None:
                return {"repeat": repeat, "turn": turn} | difference
    return None


def by_category(measured: Measured, name: str, ids: Ids) -> dict[str, dict[str, Any]]:
    """The figures by task, the eight categories of MT-Bench as one."""
    tasks: dict[str, list[int | str]] = {}
    wanted = set(ids)
    for question in measured.questions:
        if question.id in wanted:
            tasks.setdefault(task_of(question.category), []).append(question.id)
    rows = {}
    for task, its_ids in tasks.items():
        found = figures(measured, name, its_ids)
        equality = _equality(measured, name, its_ids)
        rows[task] = {key: found[key] for key in BY_CATEGORY} | {key: equality[key] for key in ("equal", "total")}
    return rows
