"""Recorded answers: read from records, split into an indexed and a replayed part, and checked for leakage.

A split `time:0.9` divides the conversations by time, `time:2026-05-01` at a date, `rows:0.9` in reading order. All
answers of a conversation fall on one side, so that no answer is drafted from its own conversation's earlier turns in an
index. An answer leaks if a drafter's store already holds it verbatim, within one document.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from draftsmith.infer.text.record import TIME_FIELDS, Record
from draftsmith.infer.text.rendering import Template, last_answer


@dataclass(frozen=True, slots=True)
class Recording:
    """Token ids of a prompt as it was served and of the answer to it.

    `conversation` is the row that it was read from; `time` is in seconds since 1970, None where the row has none.
    """

    key: str
    category: str
    prompt: list[int]
    answer: list[int]
    conversation: str = ""
    time: float | None = None


def recordings(records: Iterable[Record], template: Template) -> list[Recording]:
    """Every answered turn of every record; token ids in the record are used unchanged."""
    found: list[Recording] = []
    for record in records:
        row = f"{record.source}:{record.row}"
        turns = list(_answered(record, template))
        # A record with one answer gives it the row's name.
        names = [row] if record.token_ids else [f"{row}/{turn}" for turn in range(len(turns))]
        for name, (prompt, answer) in zip(names, turns):
            if answer:
                found.append(Recording(name, record.category, prompt, answer, row, record.time))
    if not found:
        raise ValueError("no record holds an answer to replay")
    return found


def _answered(record: Record, template: Template) -> Iterable[tuple[list[int], list[int]]]:
    """(prompt, answer) of every turn."""
    if record.token_ids:
        return [(list(record.prompt_token_ids) or template.prompt_ids(record.prompt), list(record.token_ids))]
    if record.token_ids_by_turn:
        return zip(map(list, record.prompt_token_ids_by_turn), map(list, record.token_ids_by_turn))
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


def leakage(answers: Sequence[Sequence[int]], held: Sequence[bool]) -> dict[str, Any]:
    """Number and shares of the answers that a drafter's store holds.

    Short answers occur in many stores and prove nothing, so the share is given in answers and in tokens.
    """
    tokens = sum(len(answer) for answer in answers)
    leaked = sum(len(answer) for answer, is_held in zip(answers, held, strict=True) if is_held)
    return {"answers": sum(held), "share": sum(held) / len(held), "token_share": leaked / max(tokens, 1)}
