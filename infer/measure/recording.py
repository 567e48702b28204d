"""A recording: one answer that was given, with the prompt as it was served. What a drafter can be replayed against.

Which drafters there are is not known here, nor what is done with an answer (replay.py, split.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from draftsmith.infer.text.record import Record
from draftsmith.infer.text.rendering import Template, last_answer


@dataclass(frozen=True, slots=True)
class Recording:
    """Token ids of a prompt and of the answer to it. `conversation` is the row that it was read from; `time` is seconds
    since 1970, where the row tells it."""

    key: str
    category: str
    prompt: list[int]
    answer: list[int]
    conversation: str = ""
    time: float | None = None


def recordings(records: Iterable[Record], template: Template) -> list[Recording]:
    """Every answered turn of every record; token ids of the record are used as they are."""
    found: list[Recording] = []
    for record in records:
        row = f"{record.source}:{record.row}"
        turns = list(_answered(record, template))
        # One answer of a row goes by the row's name.
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
    return [last_answer(template, [*before, said]) for before, said in record.exchanges()]
