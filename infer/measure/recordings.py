"""Recorded answers: read from records, split into an indexed and a replayed part, and checked for leakage.

Spec-Bench's and FastChat's answer files (and those of `draftsmith bench`) hold no prompts: these come from the file of
questions, by question_id.

A split `time:0.9` divides the conversations by time, `time:2026-05-01` at a date, `rows:0.9` in reading order. All
answers of a conversation fall on one side, so that no answer is drafted from its own conversation's earlier turns in an
index. An answer or a prompt leaks if a drafter's store already holds it verbatim, within one document.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from draftsmith.infer.measure.answer_files import FAILED_TURN
from draftsmith.infer.text.record import TIME_FIELDS, Message, Record
from draftsmith.infer.text.records import ReadReport, read_records
from draftsmith.infer.text.rendering import Template, last_answer
from draftsmith.infer.text.tokenizer import Encoder

# What our run folders, Spec-Bench and FastChat call the questions of answer files.
QUESTION_FILES = ("questions.jsonl", "question.jsonl")
# The outer tokens of longer prompts are not compared: spaces and line breaks around a prompt change them.
SHORT = 8


@dataclass(frozen=True, slots=True)
class Recording:
    """Token ids of a prompt as it was served and of the answer to it.

    `conversation` is the row that it was read from; `time` is in seconds since 1970, None where the row has none;
    `question` is the user's last message alone, empty where the row has only token ids. `logprobs`, `logprobs_mode` and
    `sampling`: as of a Record.
    """

    key: str
    category: str
    prompt: list[int]
    answer: list[int]
    conversation: str = ""
    time: float | None = None
    question: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    logprobs_mode: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)


def with_questions(
    records: Iterable[Record], questions: str | Path | None = None, report: ReadReport | None = None
) -> Iterator[Record]:
    """Give answers that have no prompts those of their questions; other records pass unchanged.

    Args:
        records: as read.
        questions: their file; by default questions.jsonl or question.jsonl beside the answers or one folder up.
        report: counts the answers that are left out, because they failed or their question is missing.
    """
    report = ReadReport() if report is None else report
    files: dict[Path, dict[str, Record]] = {}
    missing, found = "", 0
    for record in records:
        if not record.outputs or record.messages or record.token_ids:
            yield record
            continue
        path = Path(questions).expanduser() if questions else _questions_beside(record.source)
        if path not in files:
            files[path] = {one.id: one for one in read_records([path], need="questions")}
        question = files[path].get(record.id)
        if problem := _misfit(record, question):
            report.used -= 1
            report.skip(problem, f"{record.source} row {record.row}")
            missing = missing or f"{record.source} row {record.row}: {problem} (question_id {record.id}, {path})"
        elif question is not None:
            found += 1
            yield _joined(record, question)
    if missing and not found:
        raise ValueError(f"no answer fits its question; {missing}")
    if questions and not found:
        raise ValueError(f"no row needs the questions of {questions}: all have prompts of their own")


def _questions_beside(source: str) -> Path:
    folder = Path(source).absolute().parent
    for path in (place / name for place in (folder, folder.parent) for name in QUESTION_FILES):
        if path.is_file():
            return path
    raise ValueError(
        f"{source} holds answers without their prompts, and there is no {' or '.join(QUESTION_FILES)} beside it or one "
        "folder up: give --questions FILE"
    )


def _misfit(record: Record, question: Record | None) -> str:
    """Why an answer cannot be joined with its question; empty if it can."""
    if FAILED_TURN in record.outputs and not record.token_ids_by_turn:
        return "an answer that failed"
    if question is None:
        return "its question is not in the file of questions"
    return "more answers than the question has turns" if len(record.outputs) > len(question.questions) else ""


def _joined(record: Record, question: Record) -> Record:
    messages = [Message("system", question.system)] if question.system else []
    for asked, answer in zip(question.questions, record.outputs):
        messages += [Message("user", asked), Message("assistant", answer)]
    return replace(record, messages=messages, outputs=[], category=record.category or question.category)


def recordings(records: Iterable[Record], template: Template) -> list[Recording]:
    """Every answered turn of every record; token ids in the record are used unchanged."""
    encoder = Encoder(template.tokenizer, add_special_tokens=False)
    found: list[Recording] = []
    for record in records:
        row = f"{record.source}:{record.row}"
        turns = list(_answered(record, template))
        # A record with one answer gives it the row's name.
        names = [row] if record.token_ids else [f"{row}/{turn}" for turn in range(len(turns))]
        asked = [*_asked(record), *[""] * len(turns)]
        logged = [*record.logprobs_by_turn, *[[]] * len(turns)]
        for name, (prompt, answer), text, logprobs in zip(names, turns, asked, logged):
            if answer:
                one = Recording(name, record.category, prompt, answer, row, record.time, encoder.encode(text))
                found.append(
                    replace(one, logprobs=logprobs, logprobs_mode=record.logprobs_mode, sampling=record.sampling)
                )
    if not found:
        raise ValueError("no record holds an answer to replay")
    return found


def _asked(record: Record) -> list[str]:
    """The user's last message before every answer."""
    before = [record.prompt] if record.token_ids else [messages for messages, _ in record.exchanges()]
    return [next((one.content for one in messages[::-1] if one.role == "user"), "") for messages in before]


def _answered(record: Record, template: Template) -> Iterable[tuple[list[int], list[int]]]:
    """(prompt, answer) of every turn."""
    if record.token_ids:
        return [(list(record.prompt_token_ids) or template.prompt_ids(record.prompt), list(record.token_ids))]
    if record.token_ids_by_turn:
        prompts = record.prompt_token_ids_by_turn or [template.prompt_ids(before) for before, _ in record.exchanges()]
        return zip(map(list, prompts), map(list, record.token_ids_by_turn))
    return [last_answer(template, [*before, answer]) for before, answer in record.exchanges()]


@dataclass(frozen=True, slots=True)
class Split:
    """A requested split: the first `share` of the conversations, or those before `moment` (seconds since 1970)."""

    by: Literal["time", "rows"]
    share: float | None = None
    moment: float | None = None


@dataclass(frozen=True, slots=True)
class SplitRecordings:
    """The recordings to index and those to replay, both in order of arrival."""

    split: Split
    earlier: list[Recording]
    later: list[Recording]

    def to_json(self) -> dict[str, Any]:
        first = self.later[0].time
        return {
            "by": self.split.by,
            "share": self.split.share,
            "replayed_from": None if first is None else datetime.fromtimestamp(first, UTC).isoformat(),
            "indexed_answers": len(self.earlier),
            "indexed_tokens": sum(len(one.answer) for one in self.earlier),
            "replayed_answers": len(self.later),
        }


def parse_split(text: str) -> Split:
    """`time:SHARE`, `time:DATE` or `rows:SHARE`."""
    by, _, value = text.partition(":")
    wrong = f"--split {text!r} is not of the form time:0.9, time:2026-05-01 or rows:0.9"
    if by not in ("time", "rows") or not value:
        raise ValueError(wrong)
    try:
        share = float(value)
    except ValueError:
        if by == "rows":
            raise ValueError(wrong) from None
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(wrong) from None
        return Split("time", moment=(moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    if not 0 < share < 1:
        raise ValueError(f"--split {text!r}: the share to index must lie between 0 and 1")
    return Split("time" if by == "time" else "rows", share=share)


def in_order(streams: Sequence[Recording]) -> list[Recording]:
    """In order of time, equal times in reading order; ValueError if some have no time."""
    timeless = [one for one in streams if one.time is None]
    if timeless:
        raise ValueError(
            f"{len(timeless)} of {len(streams)} answers have no time ({timeless[0].key} is the first): give the rows "
            f"one of the fields {', '.join(TIME_FIELDS)}, or split with --split rows:0.9"
        )
    return sorted(streams, key=lambda one: one.time or 0.0)


def arrived(streams: Sequence[Recording]) -> list[Recording]:
    """In order of time if all have one, else in reading order."""
    return in_order(streams) if all(one.time is not None for one in streams) else list(streams)


def split_recordings(streams: Sequence[Recording], split: Split) -> SplitRecordings:
    """The earlier and the later part; ValueError if one of them would be empty."""
    ordered = in_order(streams) if split.by == "time" else list(streams)
    conversations = list(dict.fromkeys(one.conversation for one in ordered))
    if split.moment is not None:
        first = {one.conversation for one in ordered if (one.time or 0.0) < split.moment}
    else:
        first = set(conversations[: int(len(conversations) * (split.share or 0.0))])
    parts = SplitRecordings(
        split,
        [one for one in ordered if one.conversation in first],
        [one for one in ordered if one.conversation not in first],
    )
    if not parts.earlier or not parts.later:
        what = "index" if not parts.earlier else "replay"
        raise ValueError(f"the split leaves nothing to {what} of {len(conversations)} conversations")
    return parts


def without_ends(answer: Sequence[int], ends: Collection[int]) -> list[int]:
    """An answer without the special tokens at its end, which some logs keep and others drop."""
    ids = list(answer)
    while ids and ids[-1] in ends:
        ids.pop()
    return ids


def prompt_to_find(stream: Recording, ends: Collection[int]) -> list[int]:
    """What of a prompt a store is searched for: the user's message, or where only ids are known, the whole prompt."""
    ids = stream.question or without_ends(without_ends(stream.prompt, ends)[::-1], ends)[::-1]
    return ids[1:-1] if len(ids) > SHORT else ids


@dataclass(frozen=True, slots=True)
class Held:
    """Whether a drafter's store held an answer, and its prompt, before it was replayed."""

    answer: bool
    prompt: bool

    @property
    def any(self) -> bool:
        return self.answer or self.prompt


def leakage(streams: Sequence[Recording], held: Sequence[Held]) -> dict[str, Any]:
    """Numbers and shares of the answers and of the prompts that a drafter's store holds, and how many that leaves out.

    Short texts occur in many stores and prove nothing, so shares are given of texts and of tokens.
    """
    answers = _shares([one.answer for one in streams], [one.answer for one in held])
    prompts = _shares([one.prompt for one in streams], [one.prompt for one in held])
    return {
        "answers": answers[0],
        "share": answers[1],
        "token_share": answers[2],
        "prompts": prompts[0],
        "prompt_share": prompts[1],
        "prompt_token_share": prompts[2],
        "left_out": sum(one.any for one in held),
    }


def _shares(texts: Sequence[Sequence[int]], held: Sequence[bool]) -> tuple[int, float, float]:
    tokens = sum(map(len, texts))
    leaked = sum(len(text) for text, is_held in zip(texts, held, strict=True) if is_held)
    return sum(held), sum(held) / len(held), leaked / max(tokens, 1)
