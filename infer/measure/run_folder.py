"""A run folder: run.json, questions.jsonl, answers/NAME.jsonl, traces/NAME.jsonl.gz, results.json.

Each file is written completely or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from draftsmith.infer.files.atomic import write_json, write_rows
from draftsmith.infer.files.locations import check_writable
from draftsmith.infer.measure.answer_files import Answer, Choice, TraceRow, write_answers, write_traces
from draftsmith.infer.measure.bench import Measured, Outcome
from draftsmith.infer.measure.runners import Question


@dataclass(frozen=True, slots=True)
class RunFolder:
    path: Path

    @classmethod
    def create(cls, path: str | Path) -> RunFolder:
        """A new or empty folder; any other is refused, so that no two runs are mixed. The first file creates it."""
        check_writable(path, folder=True)
        path = Path(path)
        if path.is_dir() and any(path.iterdir()):
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
        write_rows(self.questions_path, (_question_json(question) for question in measured.questions))
        for name in measured.outcomes:
            write_answers(self.answers_path(name), answers_of(measured, name))
            traces = trace_rows(measured, name)
            if traces:
                write_traces(self.traces_path(name), traces)
        write_json(self.path / "results.json", results)


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
