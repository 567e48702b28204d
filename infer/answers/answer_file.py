"""The file of a target's answers, one JSON row per record, and the rows in it.

Each row is on disk before the next is begun, and a killed run resumes where it stopped, with no row lost or doubled.
Rows are written as they are finished and put in the order of the records at the end.

    OUT                  the answers
    OUT.run.json         their settings
    OUT.part/*.jsonl     the answers of other workers, until the file takes them over (sharded.py)
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any

from draftsmith.infer.contract.sampling import Settings
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
    """An append-only JSONL file of answers, with its settings in a file beside it; without `config`, one of OUT.part.

    A record that cannot be answered has a row with `error`; `errors` holds those written since the file was opened.
    """

    def __init__(self, path: str | Path, config: dict[str, Any] | None) -> None:
        self.path = Path(path)
        self.config = config
        self.done: set[str] = set()
        self.errors: dict[str, str] = {}
        self._file: BufferedWriter | None = None

    def __enter__(self) -> AnswerFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.config is not None:
            self._check_config(self.config)
        self._file = self.path.open("ab")
        try:
            self._read_back(self._file)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *problem: object) -> None:
        assert self._file is not None
        self._file.close()

    @property
    def shards(self) -> Path:
        """The folder of answers that other workers are writing."""
        return self.path.with_name(self.path.name + ".part")

    def _read_back(self, file: BufferedWriter) -> None:
        """Lock the file, cut off a torn last line, and take over what other workers left of a run that was killed."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{self.path} is being written by another process: wait until that ends") from error
        end = 0
        for key, _, line in _rows_of(self.path):
            self.done.add(key)
            end += len(line)
        file.truncate(end)
        for left in self._left():
            self.take_over(left)
        self.errors.clear()

    def _left(self) -> list[Path]:
        return sorted(self.shards.glob("*.jsonl"))

    def missing(self, records: Sequence[KeyedRecord]) -> list[KeyedRecord]:
        """The records without an answer in this file."""
        return [one for one in records if one.key not in self.done]

    def write(self, key: str, row: dict[str, Any]) -> None:
        """Append a row; it is on disk when this returns."""
        assert self._file is not None
        assert key not in self.done, f"{key} was answered already"
        self._append([json.dumps({"question_id": key} | row, ensure_ascii=False).encode() + b"\n"])
        self._note(key, row)

    def take_over(self, shard: Path) -> None:
        """Append the rows of a shard's file that are not here yet, and delete it."""
        new: dict[str, tuple[dict[str, Any], bytes]] = {}
        for key, row, line in _rows_of(shard):
            if key not in self.done:
                new.setdefault(key, (row, line))
        self._append([line for _, line in new.values()])
        for key, (row, _) in new.items():
            self._note(key, row)
        shard.unlink()

    def put_in_order(self, records: Sequence[KeyedRecord]) -> None:
        """Order the rows as `records`, after rows of other records; the file is replaced as a whole."""
        place = {one.key: number for number, one in enumerate(records)}
        rows, at = [], 0
        for key, _, line in _rows_of(self.path):
            rows.append((place.get(key, -1), at, len(line)))
            at += len(line)
        if rows == sorted(rows):
            return
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            with self.path.open("rb") as lines, beside.open("wb") as file:
                for _, at, length in sorted(rows):
                    lines.seek(at)
                    file.write(lines.read(length))
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self.path)
        finally:
            beside.unlink(missing_ok=True)

    def _append(self, lines: Sequence[bytes]) -> None:
        assert self._file is not None
        self._file.writelines(lines)
        self._file.flush()
        os.fsync(self._file.fileno())

    def _note(self, key: str, row: dict[str, Any]) -> None:
        self.done.add(key)
        if error := row.get("error"):
            self.errors[key] = error

    def _check_config(self, given: dict[str, Any]) -> None:
        """Refuse to continue answers of other settings, unless there is no answer yet."""
        beside = self.path.with_name(self.path.name + ".run.json")
        config = json.loads(json.dumps(given))
        begun = bool(self._left()) or (self.path.exists() and self.path.stat().st_size > 0)
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


def _rows_of(path: Path) -> Iterator[tuple[str, dict[str, Any], bytes]]:
    """(key, row, line) of every whole row; a torn last line is left out."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
                key = row["question_id"]
            except (ValueError, KeyError, TypeError) as problem:
                raise ValueError(f"{path}: row {number} is not an answer: {problem}") from problem
            yield key, row, line


class Conversation:
    """A record being answered under `settings`: its turns so far."""

    def __init__(self, record: Record, settings: Settings) -> None:
        if not record.questions:
            raise ValueError(f"{record.source}: row {record.row} asks nothing")
        self._record = record
        self._sampling = settings.named()
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
        if outputs:
            row["sampling"] = self._sampling
        if self.logprobs:
            flat = len(turns) == 1
            row |= {"logprobs": self.logprobs[0]} if flat else {"logprobs_by_turn": self.logprobs}
            row["logprobs_mode"] = PROCESSED
        if self.messages[0].role == "system":
            row["messages"] = [message.to_chat() for message in self.messages]
        return row
