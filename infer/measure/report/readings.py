"""What a report needs of a run beyond results.json: figures by context length and by question, and examples.

One pass over each trace file. Questions that the run's own figures leave out are left out here too.

Legend: S steps.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import reduce
from operator import add

import numpy as np

from draftsmith.infer.files.atomic import read_rows
from draftsmith.infer.measure.answer_files import Answer, read_answers
from draftsmith.infer.measure.metrics import Totals, distinct_share, ratio
from draftsmith.infer.measure.report.examples import Example, examples, find_tokenizer
from draftsmith.infer.measure.report.runs import ReportedRun
from draftsmith.infer.measure.report.traces import Steps, read_steps

# Fewer steps than this in a slice say nothing.
LEAST = 30
# An answer with a smaller share of distinct 4-grams is a loop.
LOOPS = 0.5

ByQuestion = dict[str, Totals]
ByContext = dict[int, Totals]


@dataclass(slots=True)
class Readings:
    """By runner's label. A context slice is named by the power of two that it begins with; `looping` counts answers."""

    contexts: dict[str, ByContext] = field(default_factory=dict)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    looping: int = 0
    answered: int = 0
    tokenizer: bool = False

    def speedups_by_context(self, label: str, baseline: str) -> dict[int, float]:
        """Slice -> speedup, where both the runner and plain decoding have steps enough to say so."""
        plain, own = self.contexts.get(baseline, {}), self.contexts.get(label, {})
        found = {}
        for start, totals in own.items():
            base = plain.get(start, Totals())
            rate, base_rate = totals.tokens_per_s, base.tokens_per_s
            if min(totals.steps, base.steps) >= LEAST and rate is not None and base_rate is not None:
                speedup = ratio(rate, base_rate)
                if speedup is not None:
                    found[start] = speedup
        return found


def read(run: ReportedRun, shown: Collection[str]) -> Readings:
    """`shown`: the labels whose best and worst questions are wanted."""
    readings = Readings()
    tokenizer = find_tokenizer(run.target) if run.target else None
    readings.tokenizer = tokenizer is not None
    prompts = _prompts(run)
    plain_answers = _answers(run, run.baseline)
    loops = [distinct_share(answer.choices[0].token_ids) < LOOPS for answer in plain_answers if answer.choices]
    readings.looping, readings.answered = sum(loops), len(loops)
    plain: ByQuestion = {}
    others = [label for label in run.results["drafters"] if label != run.baseline]
    for label in [run.baseline, *others]:
        path = run.folder.traces_path(label)
        if not path.is_file():
            continue
        steps = read_steps(path)
        counted = _counted(run, label, plain_answers)
        readings.contexts[label] = _by_context(steps, counted)
        by_question = _by_question(steps, counted)
        if label == run.baseline:
            plain = by_question
        if label in shown:
            answers = _answers(run, label)
            readings.examples[label] = examples(steps, answers, by_question, plain, prompts, tokenizer)
    return readings


def _answers(run: ReportedRun, label: str) -> list[Answer]:
    return read_answers(run.folder.answers_path(label))


def _counted(run: ReportedRun, label: str, plain: list[Answer]) -> set[str]:
    """The questions that figures of this runner are over: neither left out nor failed by it or by plain decoding."""
    failed = {str(one["question_id"]) for one in run.results["drafters"][label].get("error_list", [])}
    return {str(one.question_id) for one in plain if one.choices} - failed - run.left_out


def _prompts(run: ReportedRun) -> dict[str, list[str]]:
    """The questions' turns; runs from before questions were kept have none."""
    path = run.folder.questions_path
    if not path.is_file():
        return {}
    return {str(row["question_id"]): [str(turn) for turn in row["turns"]] for _, row in read_rows(path)}


def _by_question(steps: Steps, counted: Collection[str]) -> ByQuestion:
    by_answer = steps.totals(steps.answer_S, len(steps.answers))
    found: dict[str, list[Totals]] = {}
    for question_id, totals in zip(steps.question_ids(), by_answer):
        if question_id in counted:
            found.setdefault(question_id, []).append(totals)
    return {question_id: reduce(add, several) for question_id, several in found.items()}


def _by_context(steps: Steps, counted: Collection[str]) -> ByContext:
    """Slices by powers of two of the tokens that a step had before it."""
    inside = np.array([question_id in counted for question_id in steps.question_ids()], dtype=bool)
    power_S = np.frexp(np.maximum(steps.context_S, 1).astype(np.float64))[1] - 1
    group_S = np.where(inside[steps.answer_S], power_S, -1)
    by_power = steps.totals(group_S, int(power_S.max()) + 1)
    return {1 << power: totals for power, totals in enumerate(by_power) if totals.steps}
