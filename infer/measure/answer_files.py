"""Answers in Spec-Bench's format, and the traces beside them.

A row is {question_id, category, answer_id, model_id, choices: [{index, turns[], decoding_steps[], new_tokens[],
wall_time[], accept_lengths[]}], tstamp}. We add token_ids[] to a choice, and `error` to a row: a question that failed
has no choices and so no figures. Repeats of a question are further choices. In a batch, wall_time is the row's share of
the batch's time, so that it adds up to wall time. The reader also takes FastChat's answers, which have turns only.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.infer.contract.trace import StepTrace
from draftsmith.infer.files.atomic import read_rows, write_rows

MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
# Spec-Bench's text for a failed turn; the figures beside it are the previous turn's. An answer with token ids is not
# from Spec-Bench and may contain this word itself.
FAILED_TURN = "ERROR"


def task_of(category: str) -> str:
    """The task that Spec-Bench reports a category under."""
    return "mt_bench" if category in MT_BENCH else category


@dataclass(slots=True)
class Choice:
    """One answer: lists with an entry per turn, and the accepted lengths of all its steps.

    Figures and token ids that the file lacks are empty lists.
    """

    turns: list[str]
    new_tokens: list[int] = field(default_factory=list)
    wall_time: list[float] = field(default_factory=list)
    decoding_steps: list[int] = field(default_factory=list)
    accept_lengths: list[float] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)


@dataclass(slots=True)
class Answer:
    """A question's row. If `error` is set, there are no choices."""

    question_id: int | str
    category: str
    model_id: str
    choices: list[Choice] = field(default_factory=list)
    error: str = ""

    @property
    def timed(self) -> bool:
        return bool(self.choices) and all(choice.wall_time for choice in self.choices)

    @property
    def tokens(self) -> int:
        return sum(sum(choice.new_tokens) for choice in self.choices)

    @property
    def seconds(self) -> float:
        return sum(sum(choice.wall_time) for choice in self.choices)

    @property
    def accept_lengths(self) -> list[float]:
        return [length for choice in self.choices for length in choice.accept_lengths]

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {
            "question_id": self.question_id,
            "category": self.category,
            "answer_id": uuid.uuid4().hex,
            "model_id": self.model_id,
            "choices": [_choice_json(index, choice) for index, choice in enumerate(self.choices)],
            "tstamp": time.time(),
        }
        return row | {"error": self.error} if self.error else row


def _choice_json(index: int, choice: Choice) -> dict[str, Any]:
    names = ("turns", "decoding_steps", "new_tokens", "wall_time", "accept_lengths", "token_ids")
    return {"index": index} | {name: getattr(choice, name) for name in names}


def write_answers(path: Path, answers: Iterable[Answer]) -> None:
    for_writing = list(answers)
    assert not any(answer.error and answer.choices for answer in for_writing), "a failed question has no figures"
    write_rows(path, (answer.to_json() for answer in for_writing))


def read_answers(path: Path) -> list[Answer]:
    """All rows in file order, duplicates included; ValueError with file and row for a malformed one."""
    if not path.is_file():
        raise ValueError(f"{path}: no such answer file")
    answers = []
    for number, row in read_rows(path):
        try:
            answers.append(_answer(row))
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from error
    if not answers:
        raise ValueError(f"{path}: holds no answers")
    return answers


def _answer(row: Any) -> Answer:
    if not isinstance(row, dict):
        raise ValueError("an answer must be a JSON object")
    question_id = row.get("question_id")
    if isinstance(question_id, bool) or not isinstance(question_id, int | str):
        raise ValueError("question_id is missing, or neither a number nor text")
    answer = Answer(question_id, str(row.get("category", "")), str(row.get("model_id", "")))
    if row.get("error"):
        answer.error = str(row["error"])
        return answer
    choices = row.get("choices")
    if not isinstance(choices, list) or not choices:
        raise ValueError("choices is missing or empty")
    for choice in choices:
        turns = choice.get("turns") if isinstance(choice, dict) else None
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
            raise ValueError("every choice needs turns, a list of texts")
        if FAILED_TURN in turns and not choice.get("token_ids"):
            answer.error = f"turn {turns.index(FAILED_TURN) + 1} failed"
    if not answer.error:
        answer.choices = [_choice(choice) for choice in choices]
    return answer


def _choice(row: dict[str, Any]) -> Choice:
    turns = len(row["turns"])
    choice = Choice(
        turns=row["turns"],
        new_tokens=_numbers(row, "new_tokens", turns),
        wall_time=_numbers(row, "wall_time", turns),
        decoding_steps=_numbers(row, "decoding_steps", turns),
        accept_lengths=_numbers(row, "accept_lengths", None),
        token_ids=_token_ids(row, turns),
    )
    if bool(choice.new_tokens) != bool(choice.wall_time):
        raise ValueError("new_tokens and wall_time must both be there, or neither")
    if choice.wall_time and sum(choice.wall_time) <= 0:
        raise ValueError("wall_time adds up to 0")
    return choice


def _numbers(row: dict[str, Any], name: str, count: int | None) -> list[Any]:
    """A list of `count` finite numbers from zero up; empty if the key is missing."""
    values = row.get(name)
    if values is None or values == []:
        return []
    if not isinstance(values, list) or not all(_is_number(value) for value in values):
        raise ValueError(f"{name} is not a list of numbers from zero up")
    if count is not None and len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} turns")
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _token_ids(row: dict[str, Any], turns: int) -> list[list[int]]:
    token_ids = row.get("token_ids")
    if token_ids is None or token_ids == []:
        return []
    whole = isinstance(token_ids, list) and all(
        isinstance(ids, list) and all(type(token) is int for token in ids) for ids in token_ids
    )
    if not whole or len(token_ids) != turns:
        raise ValueError(f"token_ids is not a list of {turns} lists of ids, one per turn")
    return token_ids


@dataclass(slots=True)
class TraceRow:
    """A step's trace and the answer it belongs to."""

    question_id: int | str
    choice: int
    turn: int
    trace: StepTrace

    def to_json(self) -> dict[str, Any]:
        place = {"question_id": self.question_id, "choice": self.choice, "turn": self.turn}
        return place | {"trace": self.trace.to_json()}


def write_traces(path: Path, rows: Iterable[TraceRow]) -> None:
    """JSON Lines, compressed if the name ends in .gz."""
    write_rows(path, (row.to_json() for row in rows))
