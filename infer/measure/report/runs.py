"""The run folders of a report: checked, ordered, every runner named, and their traces read.

A report is about one target. Its runs differ in batch size and temperature; any other difference is listed.

Legend: S steps.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from draftsmith.infer.drafters.registry import Spec, parse_spec, split_outside_brackets
from draftsmith.infer.files.atomic import read_rows
from draftsmith.infer.measure.answer_files import Answer, read_answers
from draftsmith.infer.measure.bootstrap import without_small_samples
from draftsmith.infer.measure.metrics import Totals, distinct_share, ratio
from draftsmith.infer.measure.report.traces import Example, Steps, examples, find_tokenizer, read_steps
from draftsmith.infer.measure.run_folder import UNFINISHED, RunFolder, machine

# Settings that may differ between the runs of one report without a warning.
EXPECTED_TO_DIFFER = {"batch_size", "temperature", "drafters", "peers", "out", "json", "repeats", "warmup"}
# A slice of contexts with fewer steps is not shown.
MIN_STEPS = 30
# An answer with a smaller share of distinct 4-grams is a loop.
LOOPS = 0.5


@dataclass(slots=True)
class ReportedRun:
    """One run folder. `specs`: the drafters as written on the command line, by label; `names`: the names shown.

    `label` is unique in the report, `place` among the runs of the same temperature.
    """

    path: Path
    facts: dict[str, Any]
    results: dict[str, Any]
    specs: dict[str, tuple[str, Spec]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    label: str = ""
    place: str = ""

    @classmethod
    def of(cls, path: Path, facts: dict[str, Any], results: dict[str, Any]) -> ReportedRun:
        run = cls(path, facts, results)
        run.specs = specs_by_label(str(run.config.get("drafters") or ""))
        return run

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.facts.get("config") or {})

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.path)

    @property
    def target(self) -> str:
        return str(self.config.get("target") or "")

    @property
    def temperature(self) -> float:
        sampling = self.facts.get("sampling") or {}
        return float(sampling.get("temperature", self.config.get("temperature", 0.0)))

    @property
    def batch_size(self) -> int:
        return int(self.results["batch_size"])

    @property
    def settings(self) -> tuple[float, int]:
        return self.temperature, self.batch_size

    @property
    def baseline(self) -> str:
        return str(self.results["baseline"])

    @property
    def left_out(self) -> set[str]:
        return {str(question_id) for question_id in self.results["left_out"]["ids"]}

    def spec(self, label: str) -> str:
        """The drafter as written on the command line; the label of a runner that was not."""
        return self.specs[label][0] if label in self.specs else label


def read_runs(paths: Sequence[str | Path]) -> list[ReportedRun]:
    """All runs, by temperature and batch size."""
    if not paths:
        raise ValueError("give one run folder or more, such as runs/first: what `draftsmith bench --out` wrote")
    distinct = {Path(path).resolve(): Path(path) for path in paths}
    runs = [_read(path) for path in distinct.values()]
    targets = sorted({run.target for run in runs})
    if len(targets) > 1:
        raise ValueError(f"a report is about one target, and these runs have {', '.join(targets)}")
    runs.sort(key=lambda run: run.settings)
    _label(runs)
    _name(runs)
    return runs


def _read(path: Path) -> ReportedRun:
    facts, results = (_json(path, name) for name in ("run.json", "results.json"))
    missing = {"drafters", "baseline", "batch_size", "left_out"} - set(results)
    if missing:
        raise ValueError(f"{path / 'results.json'} was not written by bench: it lacks {', '.join(sorted(missing))}")
    if results["baseline"] not in results["drafters"]:
        raise ValueError(f"{path / 'results.json'} has no figures of {results['baseline']!r}, its own baseline")
    results["drafters"] = {label: without_small_samples(row) for label, row in results["drafters"].items()}
    return ReportedRun.of(path, facts, results)


def _json(path: Path, name: str) -> dict[str, Any]:
    file = path / name
    if not file.is_file():
        unfinished = (path / UNFINISHED).is_file()
        mend = "; give the same `draftsmith bench` command again to finish it" if unfinished else ""
        raise ValueError(f"{path} is not a finished run folder: it has no {name}{mend}")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} does not hold one JSON object")
    return value


def specs_by_label(text: str) -> dict[str, tuple[str, Spec]]:
    """Label -> (as written, parsed), with the labels that the loader gives: a second `small` is small-2."""
    found: dict[str, tuple[str, Spec]] = {}
    for written in split_outside_brackets(text):
        spec = parse_spec(written)
        label = spec.label or (Path(spec.name).stem if spec.is_file else spec.name)
        candidate, count = label, 1
        while candidate in found:
            count += 1
            candidate = f"{label}-{count}"
        found[candidate] = (written, spec)
    return found


def _label(runs: list[ReportedRun]) -> None:
    """Label runs by batch size, by temperature if there are several, and by folder if both are the same."""
    several = len({run.temperature for run in runs}) > 1
    for run in runs:
        twins = sum(other.settings == run.settings for other in runs) > 1
        folder = f", {run.path.name}" if twins else ""
        run.place = f"batch {run.batch_size}{folder}"
        run.label = f"batch {run.batch_size}" + (f", temperature {run.temperature:g}" if several else "") + folder


def _name(runs: list[ReportedRun]) -> None:
    """One name for one drafter in all runs: its label, or the spec as written if a label means several drafters."""
    for run in runs:
        for label in run.results["drafters"]:
            written = {other.spec(label) for other in runs if label in other.results["drafters"]}
            run.names[label] = label if len(written) == 1 else run.spec(label)
    before = [dict(run.names) for run in runs]
    for run, own in zip(runs, before):
        twins = [names for other, names in zip(runs, before) if other is not run and other.settings == run.settings]
        for label, name in own.items():
            if label != run.baseline and any(name in names.values() for names in twins):
                run.names[label] = f"{name} in {run.path.name}"


def other_settings(runs: Sequence[ReportedRun]) -> dict[str, list[str]]:
    """Setting -> its values, where the runs differ in more than EXPECTED_TO_DIFFER; the machine counts as a setting."""
    described = [
        {key: str(value) for key, value in run.config.items() if key not in EXPECTED_TO_DIFFER}
        | {"machine": machine(run.facts), "questions": str(run.results.get("questions"))}
        for run in runs
    ]
    keys = list(dict.fromkeys(key for one in described for key in one))
    values = {key: list(dict.fromkeys(one.get(key, "not set") for one in described)) for key in keys}
    return {key: several for key, several in values.items() if len(several) > 1}


@dataclass(slots=True)
class Readings:
    """Figures that results.json lacks, by runner's label.

    A context slice is named by its first length, a power of two. `looping` counts plain decoding's answers.
    """

    contexts: dict[str, dict[int, Totals]] = field(default_factory=dict)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    looping: int = 0
    answered: int = 0
    tokenizer: bool = False

    def speedups_by_context(self, label: str, baseline: str) -> dict[int, float]:
        """Slice -> speedup, where the runner and plain decoding both have enough steps."""
        plain = self.contexts.get(baseline, {})
        found = {}
        for start, own in self.contexts.get(label, {}).items():
            base = plain.get(start, Totals())
            speedup = ratio(own.tokens_per_s or 0.0, base.tokens_per_s or 0.0)
            if min(own.steps, base.steps) >= MIN_STEPS and own.tokens_per_s is not None and speedup is not None:
                found[start] = speedup
        return found


def read(run: ReportedRun, shown: Collection[str]) -> Readings:
    """Read a run's traces, each once; `shown` are the labels whose best and worst questions are wanted."""
    readings = Readings()
    tokenizer = find_tokenizer(run.target) if run.target else None
    readings.tokenizer = tokenizer is not None
    prompts = _prompts(run)
    plain_answers = _answers(run, run.baseline)
    loops = [distinct_share(answer.choices[0].token_ids) < LOOPS for answer in plain_answers if answer.choices]
    readings.looping, readings.answered = sum(loops), len(loops)
    plain: dict[str, Totals] = {}
    for label in sorted(run.results["drafters"], key=lambda label: label != run.baseline):
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
    """The questions behind this runner's figures: not left out, and not failed by it or by plain decoding."""
    failed = {str(one["question_id"]) for one in run.results["drafters"][label].get("error_list", [])}
    return {str(one.question_id) for one in plain if one.choices} - failed - run.left_out


def _prompts(run: ReportedRun) -> dict[str, list[str]]:
    """The questions' turns; old run folders have no questions.jsonl."""
    path = run.folder.questions_path
    if not path.is_file():
        return {}
    return {str(row["question_id"]): [str(turn) for turn in row["turns"]] for _, row in read_rows(path)}


def _by_question(steps: Steps, counted: Collection[str]) -> dict[str, Totals]:
    found: dict[str, Totals] = {}
    for question_id, totals in zip(steps.question_ids(), steps.totals(steps.answer_S, len(steps.answers))):
        if question_id in counted:
            found[question_id] = found.get(question_id, Totals()) + totals
    return found


def _by_context(steps: Steps, counted: Collection[str]) -> dict[int, Totals]:
    """Slices by powers of two of a step's context length."""
    inside = np.array([question_id in counted for question_id in steps.question_ids()], dtype=bool)
    power_S = np.frexp(np.maximum(steps.context_S, 1).astype(np.float64))[1] - 1
    group_S = np.where(inside[steps.answer_S], power_S, -1)
    by_power = steps.totals(group_S, int(power_S.max()) + 1)
    return {1 << power: totals for power, totals in enumerate(by_power) if totals.steps}
