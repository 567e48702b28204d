"""A run folder: run.json, questions.jsonl, answers/NAME.jsonl, traces/NAME.jsonl.gz, results.json.

Each file is written completely or not at all. While a run is under way, unfinished.jsonl holds what it has measured,
and the same command goes on from there.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

from draftsmith.infer.contract.trace import Generation, StepTrace
from draftsmith.infer.costs.identity import TargetIdentity
from draftsmith.infer.files.atomic import read_rows, write_json, write_rows
from draftsmith.infer.files.locations import check_writable
from draftsmith.infer.measure.answer_files import Answer, Choice, TraceRow, write_answers, write_traces
from draftsmith.infer.measure.bench import Measured, Outcome, Turn, Visit
from draftsmith.infer.measure.runners import Question

UNFINISHED = "unfinished.jsonl"
# Settings that a resumed run may change: they have no influence on what is measured.
FREE = {"out", "json"}


@dataclass(frozen=True, slots=True)
class RunFolder:
    path: Path

    @classmethod
    def create(cls, path: str | Path, resumable: bool = False) -> RunFolder:
        """A new or empty folder, or that of an unfinished run; others are refused, so that no two runs are mixed.

        The first file creates the folder.
        """
        check_writable(path, folder=True)
        path = Path(path)
        unfinished = resumable and (path / UNFINISHED).is_file()
        if path.is_dir() and any(path.iterdir()) and not unfinished:
            raise ValueError(f"{path} is not empty: give a new folder, so that no run is mixed with another")
        return cls(path)

    @property
    def questions_path(self) -> Path:
        return self.path / "questions.jsonl"

    def answers_path(self, name: str) -> Path:
        return self.path / "answers" / f"{_file_name(name)}.jsonl"

    def traces_path(self, name: str) -> Path:
        return self.path / "traces" / f"{_file_name(name)}.jsonl.gz"

    def write_run(self, provenance: dict[str, Any]) -> None:
        """run.json: how, with what and where every number of the run was measured."""
        missing = {"command", "config", "seed"} - set(provenance)
        assert not missing, f"run.json lacks {', '.join(sorted(missing))}"
        write_json(self.path / "run.json", provenance)

    def write_measured(self, measured: Measured, results: dict[str, Any]) -> None:
        """Questions, answers and traces of every runner. The results come last: if they exist, so does the rest."""
        self.write_questions(measured.questions)
        for name in measured.outcomes:
            write_answers(self.answers_path(name), answers_of(measured, name))
            traces = trace_rows(measured, name)
            if traces:
                write_traces(self.traces_path(name), traces)
        self.write_results(results)

    def write_questions(self, questions: Sequence[Question]) -> None:
        write_rows(self.questions_path, (_question_json(question) for question in questions))

    def write_results(self, results: dict[str, Any]) -> None:
        write_json(self.path / "results.json", results)


@dataclass(slots=True)
class UnfinishedRun:
    """The visits of a run, each on disk before the next begins. Only one process at a time can hold it."""

    path: Path
    visits: list[Visit] = field(default_factory=list)
    _file: BinaryIO | None = None

    @classmethod
    def begin(cls, folder: RunFolder, provenance: dict[str, Any], questions: Sequence[Question]) -> UnfinishedRun:
        """Begin a run, or go on with the one that the folder holds; ValueError if that one is another.

        run.json notes each time that the run was resumed.
        """
        folder.path.mkdir(parents=True, exist_ok=True)
        run = cls(folder.path / UNFINISHED)
        run._file = run.path.open("a+b")
        try:
            fcntl.flock(run._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            before = folder.path / "run.json"
            if before.is_file():
                provenance = _same_run(folder, json.loads(before.read_text(encoding="utf-8")), provenance, questions)
                run._read()
                provenance["resumed"][-1]["visits"] = len(run.visits)
            else:
                folder.write_questions(questions)
            folder.write_run(provenance)
        except BaseException as error:
            run._file.close()
            if isinstance(error, BlockingIOError):
                raise ValueError(f"{folder.path} is being written by another process: wait until that ends") from error
            raise
        return run

    def _read(self) -> None:
        """Read whole lines; a line that a kill cut short is dropped from the file."""
        assert self._file is not None
        self._file.seek(0)
        whole = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            self.visits.append(_visit_from_json(json.loads(line)))
            whole += len(line)
        self._file.truncate(whole)

    def add(self, visit: Visit) -> None:
        assert self._file is not None
        row = {name: [asdict(outcome) for outcome in outcomes] for name, outcomes in visit.items()}
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Everything is written: the folder is a finished run."""
        assert self._file is not None
        self.path.unlink()
        self._file.close()


def _same_run(
    folder: RunFolder, before: dict[str, Any], now: dict[str, Any], questions: Sequence[Question]
) -> dict[str, Any]:
    """run.json for a resumed run; ValueError if its settings, target or questions are not those of `before`."""
    facts: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = [(before["config"], now["config"])]
    facts.append(({"weights": before.get("weights")}, {"weights": now.get("weights")}))
    changed = [
        f"{key} was {old.get(key)}, is {new.get(key)}"
        for old, new in facts
        for key in sorted({*old, *new} - FREE)
        if old.get(key) != new.get(key)
    ]
    if not changed and [row for _, row in read_rows(folder.questions_path)] != list(map(_question_json, questions)):
        changed = ["the questions have changed"]
    if changed:
        raise ValueError(
            f"{folder.path} holds an unfinished run with other settings ({'; '.join(changed)}): give the same command "
            "to resume it, or a new folder"
        )
    resumed = {key: now.get(key) for key in ("date", "git", "versions", "hardware")}
    return before | {"resumed": [*before.get("resumed", []), resumed]}


def _visit_from_json(row: dict[str, Any]) -> Visit:
    return {name: [_outcome_from_json(outcome) for outcome in outcomes] for name, outcomes in row.items()}


def _outcome_from_json(row: dict[str, Any]) -> Outcome:
    turns = []
    for turn in row["turns"]:
        traces = [StepTrace.from_json(trace) for trace in turn["generation"].pop("traces")]
        turns.append(Turn(turn["text"], Generation(**turn["generation"], traces=traces), turn["wall_s"]))
    return Outcome(turns, row["error"])


@dataclass(frozen=True, slots=True)
class RunFacts:
    """How the answers in a run folder were made; `facts` is run.json, empty where there is none."""

    folder: Path
    facts: dict[str, Any]

    @classmethod
    def around(cls, answers: Path) -> RunFacts | None:
        """The run that an answer file lies in; None for a file that lies in no run folder."""
        folder = answers.resolve().parent.parent
        if answers.resolve().parent.name != "answers":
            return None
        run = folder / "run.json"
        try:
            facts = json.loads(run.read_text(encoding="utf-8")) if run.is_file() else {}
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{run} cannot be read: {error}") from error
        return cls(folder, facts if isinstance(facts, dict) else {})

    @property
    def target(self) -> str:
        return str((self.facts.get("config") or {}).get("target") or "")

    def has_target_of(self, other: RunFacts) -> bool:
        """Run folders written before targets were recorded are compared by the target's path."""
        mine, theirs = self.facts.get("target"), other.facts.get("target")
        if isinstance(mine, dict) and isinstance(theirs, dict):
            return TargetIdentity.from_json(mine).is_same(TargetIdentity.from_json(theirs))
        paths = [Path(one.target).expanduser() for one in (self, other)]
        return self.target == other.target or (all(path.exists() for path in paths) and paths[0].samefile(paths[1]))

    @property
    def settings(self) -> dict[str, str]:
        """What changes answers or speed, in words; the seed only where it decides anything."""
        config, sampling = self.facts.get("config") or {}, dict(self.facts.get("sampling") or {})
        if not sampling.get("temperature"):
            sampling.pop("seed", None)
        known = {key: config[key] for key in ("max_new_tokens", "batch_size", "dtype", "template") if key in config}
        return {key: str(value) for key, value in (known | sampling | {"machine": machine(self.facts)}).items()}

    @property
    def questions(self) -> dict[str, Any]:
        """The prompts by question; run folders written by old versions have none."""
        path = RunFolder(self.folder).questions_path
        rows = [row for _, row in read_rows(path)] if path.is_file() else []
        return {str(row["question_id"]): (row["turns"], row.get("system")) for row in rows}


def machine(facts: dict[str, Any]) -> str:
    """The hardware of a run.json in a few words."""
    hardware = facts.get("hardware") or {}
    gpus = [str(gpu.get("name")) for gpu in hardware.get("gpus") or []]
    if gpus and str((facts.get("config") or {}).get("device", "auto")) != "cpu":
        return gpus[0] if len(gpus) == 1 else f"{len(gpus)} x {gpus[0]}"
    cpu = hardware.get("cpu") or {}
    cores = cpu.get("cores_usable") or cpu.get("cores")
    return f"{cpu.get('model') or 'unknown CPU'}" + (f", {cores} cores" if cores else "")


def _question_json(question: Question) -> dict[str, Any]:
    """The question in Spec-Bench's format, kept because the question files may move."""
    row = {"question_id": question.id, "category": question.category, "turns": list(question.turns)}
    return row | ({"system": question.system} if question.system else {})


def _file_name(name: str) -> str:
    """A file name of its own for every runner, inside the folder."""
    return quote(name, safe="+,=@ ")


def answer_paths(folder: Path) -> dict[str, Path]:
    """The answer files of a run folder by the runners' names."""
    return {unquote(path.name.removesuffix(".jsonl")): path for path in sorted((folder / "answers").glob("*.jsonl"))}


def answers_of(measured: Measured, name: str) -> list[Answer]:
    """One runner's answers in Spec-Bench's format; every repeat is a choice."""
    answers = []
    for question in measured.questions:
        answer = Answer(question.id, question.category, name, error=measured.error(name, question.id))
        if not answer.error:
            answer.choices = [_choice(outcome) for outcome in measured.outcomes[name][question.id]]
        answers.append(answer)
    return answers


def _choice(outcome: Outcome) -> Choice:
    return Choice(
        turns=[turn.text for turn in outcome.turns],
        new_tokens=[len(turn.generation.token_ids) for turn in outcome.turns],
        wall_time=[turn.wall_s for turn in outcome.turns],
        decoding_steps=[len(turn.generation.traces) for turn in outcome.turns],
        accept_lengths=[trace.committed for trace in outcome.traces],
        token_ids=outcome.token_ids,
    )


def trace_rows(measured: Measured, name: str) -> list[TraceRow]:
    return [
        TraceRow(question.id, choice, turn, trace)
        for question in measured.questions
        if not measured.error(name, question.id)
        for choice, outcome in enumerate(measured.outcomes[name][question.id])
        for turn, answered in enumerate(outcome.turns)
        for trace in answered.generation.traces
    ]
