"""A target's own answers to a set of prompts: the in-distribution corpus for drafts and stores.

Answers are appended row by row, each on disk before the next is begun; a run that was killed at any moment is taken up
where it stopped, with no row lost and none twice. Every row keeps its token ids. Which prompts there are and how they
are rendered is the caller's to say.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any

from draftsmith.infer.contract.protocols import Drafter, Target
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.files.atomic import write_json
from draftsmith.infer.text.record import Message, Record
from draftsmith.infer.text.rendering import Template

CHUNK = 8


@dataclass(frozen=True, slots=True)
class AnswerSettings:
    """One record to answer, under a key that no other record of the run has."""

    key: str
    record: Record


def with_keys(records: Iterable[Record]) -> list[AnswerSettings]:
    """Number records that share an id: the second `7` is `7#2`."""
    seen: Counter[str] = Counter()
    asked = []
    for record in records:
        seen[record.id] += 1
        asked.append(AnswerSettings(record.id if seen[record.id] == 1 else f"{record.id}#{seen[record.id]}", record))
    return asked


class AnswerFile:
    """An append-only JSONL file of answers, with the settings that made it beside it."""

    def __init__(self, path: str | Path, config: dict[str, Any]) -> None:
        self.path = Path(path)
        self.config = config
        self.done: set[str] = set()
        self._file: BufferedWriter | None = None

    def __enter__(self) -> AnswerFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._check_config()
        end = self._read_back()
        self._file = self.path.open("ab")
        self._file.truncate(end)
        return self

    def __exit__(self, *problem: object) -> None:
        assert self._file is not None
        self._file.close()

    def write(self, key: str, row: dict[str, Any]) -> None:
        """Append a row; it is on disk when this returns."""
        assert self._file is not None
        assert key not in self.done, f"{key} was answered already"
        self._file.write(json.dumps({"question_id": key} | row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done.add(key)

    def _check_config(self) -> None:
        """Answers of other settings are not continued; a run that got no further than its settings holds none."""
        beside = self.path.with_name(self.path.name + ".run.json")
        config = json.loads(json.dumps(self.config))
        begun = self.path.exists() and self.path.stat().st_size > 0
        if begun and beside.exists():
            known = json.loads(beside.read_text(encoding="utf-8"))
            changed = sorted(key for key in {*known, *config} if known.get(key) != config.get(key))
            if changed:
                raise ValueError(
                    f"{self.path} was begun with other settings ({', '.join(changed)}): give another --out, or the "
                    "same settings to go on"
                )
        elif begun:
            raise ValueError(f"{self.path} exists and is no run of `draftsmith answers`: give another --out")
        write_json(beside, config)

    def _read_back(self) -> int:
        """Take in the rows that are there; returns where the last whole one ends. A torn last line is cut off."""
        if not self.path.exists():
            return 0
        end = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    self.done.add(json.loads(line)["question_id"])
                except (ValueError, KeyError, TypeError) as problem:
                    raise ValueError(f"{self.path}: row {number} is not an answer: {problem}") from problem
                end += len(line)
        return end


def answer_all(
    target: Target,
    drafter: Drafter,
    asked: Sequence[AnswerSettings],
    template: Template,
    settings: Settings,
    stops: Stops,
    out: AnswerFile,
    *,
    batch_size: int = 8,
    progress: Callable[[int, int, int], None] | None = None,
) -> None:
    """Answer what `out` does not hold yet, several turns where a record has them. `drafter` is bound already.

    `progress(done, asked, tokens)` after every row.
    """
    waiting = [one for one in asked if one.key not in out.done]
    tokens = 0
    for at in range(0, len(waiting), batch_size * CHUNK):
        part = {one.key: _Conversation(one, template) for one in waiting[at : at + batch_size * CHUNK]}

        def done(generation: Generation, part: dict[str, _Conversation] = part) -> None:
            nonlocal tokens
            conversation = part[generation.row.rpartition("/")[0]]
            conversation.take(generation)
            tokens += len(generation.token_ids)
            if conversation.finished:
                out.write(conversation.asked.key, conversation.row())
                if progress is not None:
                    progress(len(out.done), len(asked), tokens)

        while any(not conversation.finished for conversation in part.values()):
            rows = [
                Row(f"{key}/{len(c.token_ids)}", c.prompt(), settings, stops, target.tokenizer)
                for key, c in part.items()
                if not c.finished
            ]
            generate(target, drafter, rows, batch_size=batch_size, on_done=done)


class _Conversation:
    """A record on its way: the turns answered so far."""

    def __init__(self, asked: AnswerSettings, template: Template) -> None:
        self.asked = asked
        self._template = template
        self._turns = asked.record.questions
        if not self._turns:
            raise ValueError(f"{asked.record.source}: row {asked.record.row} asks nothing")
        system = asked.record.system
        self.messages = [Message("system", system)] if system else []
        self.prompts: list[list[int]] = []
        self.token_ids: list[list[int]] = []
        self.outputs: list[str] = []
        self.stops: list[str] = []

    @property
    def finished(self) -> bool:
        return len(self.outputs) == len(self._turns)

    def prompt(self) -> list[int]:
        self.messages.append(Message("user", self._turns[len(self.outputs)]))
        self.prompts.append(self._template.prompt_ids(self.messages))
        return list(self.prompts[-1])

    def take(self, generation: Generation) -> None:
        self.messages.append(Message("assistant", generation.text))
        self.outputs.append(generation.text)
        self.token_ids.append(generation.token_ids)
        self.stops.append(generation.stop)

    def row(self) -> dict[str, Any]:
        return answer_row(self.asked.record.category, self.messages, self.prompts, self.token_ids, self.stops)


def answer_row(
    category: str,
    messages: Sequence[Message],
    prompts: Sequence[Sequence[int]],
    token_ids: Sequence[Sequence[int]],
    stops: Sequence[str],
) -> dict[str, Any]:
    """What is written of one answered record; a record of one turn is flat, as the reader takes token ids."""
    turns = [message.content for message in messages if message.role == "user"]
    outputs = [message.content for message in messages if message.role == "assistant"]
    if len(turns) == 1:
        row: dict[str, Any] = {"prompt": turns[0], "output": outputs[0]}
        row |= {"prompt_token_ids": list(prompts[0]), "token_ids": list(token_ids[0]), "stop": stops[0]}
    else:
        row = {"turns": list(turns), "outputs": list(outputs), "stops": list(stops)}
        row |= {
            "prompt_token_ids_by_turn": [list(p) for p in prompts],
            "token_ids_by_turn": [list(t) for t in token_ids],
        }
    if messages[0].role == "system":
        row["messages"] = [message.to_chat() for message in messages]
    return {"category": category} | row


def last_answer(template: Template, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """The last answer of a conversation as served: the ids that it was given, and those that were emitted."""
    rendered = template.render_served(messages)[-1]
    split = len(rendered.loss_mask)
    while split and rendered.loss_mask[split - 1]:
        split -= 1
    return list(rendered.token_ids[:split]), list(rendered.token_ids[split:])
