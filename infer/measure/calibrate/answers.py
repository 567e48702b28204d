"""The target's own answers to held-out prompts, by plain decoding: drafts are judged along this text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from draftsmith.infer.contract.protocols import Target
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.measure.metrics import distinct_share
from draftsmith.infer.text.record import Message, Record
from draftsmith.infer.text.rendering import Template


@dataclass(frozen=True, slots=True)
class Answered:
    """One turn: `number` is its record's, `key` its row's, so that a seed draws the same tokens again."""

    number: int
    key: str
    prompt: list[int]
    answer: list[int]


def answer_prompts(
    target: Target,
    records: Sequence[Record],
    template: Template,
    settings: Settings,
    stops: Stops,
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> list[Answered]:
    """The target's answers to every turn of `records`; calls `progress(turns done, turns)`."""
    messages = [[Message("system", record.system)] if record.system else [] for record in records]
    turns = sum(len(record.questions) for record in records)
    done = count(1)

    def on_done(generation: Generation) -> None:
        if progress is not None:
            progress(next(done), turns)

    found: list[Answered] = []
    for turn in range(max((len(record.questions) for record in records), default=0)):
        asked = [number for number, record in enumerate(records) if turn < len(record.questions)]
        rows = []
        for number in asked:
            messages[number].append(Message("user", records[number].questions[turn]))
            prompt = template.prompt_ids(messages[number])
            rows.append(Row(f"{number}/{turn}", list(prompt), settings, stops, target.tokenizer))
        answers = Engine(target, batch_size=batch_size).run(rows, on_done=on_done, strict=True)
        for number, row, answer in zip(asked, rows, answers):
            messages[number].append(Message("assistant", answer.text))
            found.append(Answered(number, row.key, row.ids[: row.prompt_tokens], answer.token_ids))
    return found


def without_loops(answers: Sequence[Answered], min_distinct: float) -> list[Answered]:
    """Leave out answers with a smaller share of distinct 4-grams: loops flatter every draft."""
    return [one for one in answers if distinct_share([one.answer]) >= min_distinct]
