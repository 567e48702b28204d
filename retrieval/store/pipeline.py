"""From records to the segments of a new store, in two kinds of tasks for one or many workers.

Some records are made into documents; documents that fill a segment are written as one. Where segments begin is decided
by the documents in the order of their records, so it depends neither on the workers nor on which of them was faster.

    progress.json        the segments that are written, with the records that they were made from

A build that was killed reads past the records of those segments, and does the others.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from draftsmith.infer.files.atomic import write_json
from draftsmith.infer.files.workers import Note, Work
from draftsmith.infer.text.records import ReadReport, Tally
from draftsmith.retrieval.store.documents import Document
from draftsmith.retrieval.store.format import parts_from_json
from draftsmith.retrieval.store.segment_writer import Cut, Cutter, MakeParts, write_segment
from draftsmith.retrieval.store.segments import Segment

PROGRESS = "progress.json"
RECORDS_AT_ONCE = 128

# The documents of a record; the report takes notes on it.
MakeDocuments = Callable[[Any, ReadReport], list[Document]]


def as_given(record: list[Document], report: ReadReport) -> list[Document]:
    """For records that are documents already."""
    return record


@dataclass(frozen=True, slots=True)
class _Made:
    """The documents of each of some records, and notes on the records."""

    batches: list[list[Document]]
    notes: dict[str, Tally]


@dataclass(frozen=True, slots=True)
class Builder:
    """What a worker calls before its first task."""

    folder: Path
    dtype: str
    make_documents: MakeDocuments
    make_parts: MakeParts

    def __call__(self) -> Work:
        dtype = np.dtype(self.dtype)

        def work(task: list[Any] | Cut, note: Note) -> _Made | Segment:
            if isinstance(task, Cut):
                return write_segment(self.folder, dtype, self.make_parts, task)
            report = ReadReport()
            batches = [
                [replace(made, ids=made.ids.astype(dtype)) for made in self.make_documents(record, report)]
                for record in task
            ]
            note(len(task), sum(len(document.ids) for batch in batches for document in batch))
            return _Made(batches, report.notes)

        return work


@dataclass(frozen=True, slots=True)
class _Written:
    """A segment on disk, and the records that it was made from."""

    number: int
    first: int
    records: int
    segment: Segment


class Finished:
    """The segments of a build that are written, by the number of their first record; `resumed`: of a build with the
    same job that was killed."""

    def __init__(self, path: Path, job: dict[str, Any]) -> None:
        self.path = path
        self.by_first: dict[int, _Written] = {}
        self._job = hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()
        known = self._read()
        self.resumed = known.get("job") == self._job and "segments" in known
        self._began = time.perf_counter()
        if not self.resumed:
            return
        self._began -= known["seconds"]
        for one in known["segments"]:
            segment = Segment(**{**one["segment"], "parts": parts_from_json(one["segment"]["parts"])})
            self.by_first[one["first"]] = _Written(one["number"], one["first"], one["records"], segment)

    @property
    def seconds(self) -> float:
        """Over all runs of the build."""
        return round(time.perf_counter() - self._began, 3)

    def add(self, cut: Cut, segment: Segment) -> None:
        self.by_first[cut.first] = _Written(cut.number, cut.first, cut.records, segment)
        listed = [asdict(one) for one in self.by_first.values()]
        write_json(self.path, {"job": self._job, "seconds": self.seconds, "segments": listed})

    def segments(self) -> list[Segment]:
        return [one.segment for one in sorted(self.by_first.values(), key=lambda one: one.number)]

    def _read(self) -> dict[str, Any]:
        try:
            known: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return known


@dataclass(slots=True)
class Pipeline:
    """The tasks of a build, and what becomes of their results. `report` takes the notes on the records, in order."""

    records: Iterator[Any]
    finished: Finished
    chunk_tokens: int
    report: ReadReport
    _cutter: Cutter = field(init=False)
    # Documents, or a finished segment instead of them, by their place in the order of the records.
    _arrived: dict[int, _Made | _Written] = field(default_factory=dict)
    _places: int = 0
    _taken: int = 0
    _full: deque[Cut] = field(default_factory=deque)
    _read_all: bool = False
    # Of the tasks that are handed out: a place, or the segment that is being written.
    _out: dict[int, int | Cut] = field(default_factory=dict)
    _tasks: int = 0

    def __post_init__(self) -> None:
        self._cutter = Cutter(self.chunk_tokens)

    def tasks(self) -> Iterator[tuple[int, Any] | None]:
        for records in self._groups():
            while self._full:
                yield self._segment()
            self._places += 1
            yield self._task(self._places - 1, records)
        self._read_all = True
        self._cut()
        while self._full or self._taken < self._places:
            yield self._segment() if self._full else None

    def take(self, found: Iterable[tuple[int, Any]]) -> Iterator[Segment]:
        """Each segment once it is written; `found`: the tasks' results."""
        for number, result in found:
            task = self._out.pop(number)
            if isinstance(task, Cut):
                self.finished.add(task, result)
                yield result
            else:
                self._arrived[task] = result
                self._cut()

    def _groups(self) -> Iterator[list[Any]]:
        """The records, some at a time, without those of finished segments."""
        at, group = 0, list[Any]()
        while True:
            if (written := self.finished.by_first.get(at)) is not None and written.records:
                if group:
                    yield group
                    group = []
                self._arrived[self._places] = written
                self._places += 1
                self._cut()
                read = sum(1 for _ in islice(self.records, written.records))
                assert read == written.records
                at += read
                continue
            record = next(self.records, self)
            if record is self:
                break
            group.append(record)
            at += 1
            if len(group) == RECORDS_AT_ONCE:
                yield group
                group = []
        if group:
            yield group

    def _segment(self) -> tuple[int, Any]:
        cut = self._full.popleft()
        return self._task(cut, cut)

    def _task(self, what: int | Cut, payload: Any) -> tuple[int, Any]:
        number = self._tasks
        self._tasks += 1
        self._out[number] = what
        return number, payload

    def _cut(self) -> None:
        """Cut what has arrived into segments, in the order of the records."""
        while self._taken in self._arrived:
            arrived = self._arrived.pop(self._taken)
            self._taken += 1
            if isinstance(arrived, _Written):
                assert not self._cutter.documents, "a finished segment begins in the middle of another"
                self._cutter.skip(arrived.records)
                continue
            self.report.take_notes(arrived.notes)
            self._full.extend(cut for batch in arrived.batches if (cut := self._cutter.add(batch)) is not None)
        if self._read_all and self._taken == self._places and (cut := self._cutter.rest()) is not None:
            self._full.append(cut)
