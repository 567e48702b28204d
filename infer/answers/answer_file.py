"""The file of a target's answers, one JSON row per record, and the rows in it.

Each row is on disk before the next is begun, and a killed run resumes where it stopped, with no row lost or doubled.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any

from draftsmith.infer.files.atomic import write_json
from draftsmith.infer.text.record import Message, Record

# Log-probabilities after temperature and truncation, in vLLM's words.
PROCESSED = "processed_logprobs"


@dataclass(frozen=True, slots=True)
class KeyedRecord:
    """A record to answer, under a key that is unique in its run."""

    key: str
    record: Record


def with_keys(records: Iterable[Record]) -> list[KeyedRecord]:
    """Number records that share an id: the second `7` is `7#2`."""
    seen: Counter[str] = Counter()
    keyed = []
    for record in records:
        seen[record.id] += 1
        keyed.append(KeyedRecord(record.id if seen[record.id] == 1 else f"{record.id}#{seen[record.id]}", record))
    return keyed


class AnswerFile:
    """An append-only JSONL file of answers, with its settings in a file beside it.

    A record that cannot be answered has a row with `error`; `errors` holds those written since the file was opened.
    """

    def __init__(self, path: str | Path, config: dict[str, Any]) -> None:
        self.path = Path(path)
        self.config = config
        self.done: set[str] = set()
        self.errors: dict[str, str] = {}
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

    def missing(self, records: Sequence[KeyedRecord]) -> list[KeyedRecord]:
        """The records without an answer in this file."""
        return [one for one in records if one.key not in self.done]

    def write(self, key: str, row: dict[str, Any]) -> None:
        """Append a row; it is on disk when this returns."""
        assert self._file is not None
        assert key not in self.done, f"{key} was answered already"
        self._file.write(json.dumps({"question_id": key} | row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done.add(key)
        if error := row.get("error"):
            self.errors[key] = error

    def _check_config(self) -> None:
        """Refuse to continue answers of other settings, unless there is no answer yet."""
        beside = self.path.with_name(self.path.name + ".run.json")
        config = json.loads(json.dumps(self.config))
        begun = self.path.exists() and self.path.stat().st_size > 0
        if begun and beside.exists():
            known = json.loads(beside.read_text(encoding="utf-8"))
            changed = sorted(key for key in {*known, *config} if known.get(key) != config.get(key))
            if changed:
                raise ValueError(
                    f"{self.path} was begun with other settings ({', '.join(changed)}): use the same settings to "
                    "resume, or another --out"
                )
        elif begun:
            raise ValueError(f"{self.path} exists and was not written by `draftsmith answers`: use another --out")
        write_json(beside, config)

    def _read_back(self) -> int:
        """Fill `done`; returns where the last whole row ends. A torn last line is cut off."""
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


class Conversation:
    """A record being answered: its turns so far."""

    def __init__(self, record: Record) -> None:
        if not record.questions:
            raise ValueError(f"{record.source}: row {record.row} asks nothing")
        self._record = record
        self.messages = [Message("system", record.system)] if record.system else []
        self.prompts: list[list[int]] = []
        self.token_ids: list[list[int]] = []
        self.stops: list[str] = []
        self.logprobs: list[list[float]] = []

    @property
    def finished(self) -> bool:
        return len(self.stops) == len(self._record.questions)

    def ask(self) -> list[Message]:
        """Add the next question; returns the conversation up to it."""
        self.messages.append(Message("user", self._record.questions[len(self.stops)]))
        return self.messages

    def take(
        self,
        text: str,
        stop: str,
        prompt: Sequence[int],
        token_ids: Sequence[int],
        logprobs: Sequence[float] | None = None,
    ) -> None:
        """Add the answer to the question asked last. `logprobs`: of its tokens, as they were drawn."""
        self.messages.append(Message("assistant", text))
        self.stops.append(stop)
        self.prompts.append(list(prompt))
        self.token_ids.append(list(token_ids))
        if logprobs is not None:
            self.logprobs.append(list(logprobs))

    def row(self, error: str = "") -> dict[str, Any]:
        """What the file keeps. A record of one turn is flat, so that the reader finds its token ids.

        `error` says why the question asked last, and those after it, have no answer.
        """
        turns = [message.content for message in self.messages if message.role == "user"]
        outputs = [message.content for message in self.messages if message.role == "assistant"]
        row: dict[str, Any] = {"category": self._record.category}
        if error:
            row["error"] = error
        if not outputs:
            row["turns"] = turns
        elif len(turns) == 1:
            row |= {"prompt": turns[0], "output": outputs[0]}
            row |= {"prompt_token_ids": self.prompts[0], "token_ids": self.token_ids[0], "stop": self.stops[0]}
        else:
            row |= {"turns": turns, "outputs": outputs, "stops": self.stops}
            row |= {"prompt_token_ids_by_turn": self.prompts, "token_ids_by_turn": self.token_ids}
        if self.logprobs:
            flat = len(turns) == 1
            row |= {"logprobs": self.logprobs[0]} if flat else {"logprobs_by_turn": self.logprobs}
            row["logprobs_mode"] = PROCESSED
        if self.messages[0].role == "system":
            row["messages"] = [message.to_chat() for message in self.messages]
        return row
