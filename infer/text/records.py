"""The one reader of text in: every conversation, prompt, answer and document that any command reads comes through here.

    report = ReadReport()
    for record in read_records(["questions.jsonl", "logs/"], report=report): ...

A row is never dropped in silence: the report counts what was skipped, why, and where. How text becomes token ids is not
known here (templates.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal

from draftsmith.infer.text.read_files import RawRow, Source, find_source, read_rows, stem_of
from draftsmith.infer.text.record import Message, Record
from draftsmith.infer.text.record_formats import Unusable, has_id, parse

__all__ = ["Message", "ReadReport", "Record", "read_records"]

OnBad = Literal["raise", "skip"]
Need = Literal["questions", "answers", "documents", "exchanges"]
SHOWN = 3


@dataclass(slots=True)
class Tally:
    """How often something was met, and the first places."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        self.count += 1
        if len(self.places) < SHOWN:
            self.places.append(place)


@dataclass(slots=True)
class ReadReport:
    """What the reader made of its sources. `rows` were read; `used` became records; the rest is in `skipped`."""

    rows: int = 0
    used: int = 0
    skipped: dict[str, Tally] = field(default_factory=dict)
    notes: dict[str, Tally] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    categories: Counter[str] = field(default_factory=Counter)
    files: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    duplicate_ids: int = 0

    def skip(self, reason: str, place: str) -> None:
        self.skipped.setdefault(reason, Tally()).add(place)

    def note(self, reason: str, place: str) -> None:
        self.notes.setdefault(reason, Tally()).add(place)

    def use(self, record: Record) -> None:
        self.used += 1
        self.kinds[record.kind] += 1
        self.categories[record.category] += 1

    def lines(self) -> list[str]:
        """One line per fact, for a person."""
        lines = [f"{self.rows} rows read, {self.used} used, {self.rows - self.used} skipped"]
        for title, tallies in (("skipped", self.skipped), ("note", self.notes)):
            for reason, tally in tallies.items():
                more = ", ..." if tally.count > len(tally.places) else ""
                lines.append(f"{title}: {tally.count} x {reason}: {', '.join(tally.places)}{more}")
        if self.duplicate_ids:
            lines.append(f"note: {self.duplicate_ids} rows repeat an id of their file; both rows are kept")
        if self.ignored:
            lines.append(f"note: {len(self.ignored)} files of an unknown kind were passed over: {self.ignored[0]}, ...")
        return lines

    def to_json(self) -> dict[str, Any]:
        def tallies(given: dict[str, Tally]) -> dict[str, Any]:
            return {reason: {"count": tally.count, "places": tally.places} for reason, tally in given.items()}

        return {
            "rows": self.rows,
            "used": self.used,
            "skipped": tallies(self.skipped),
            "notes": tallies(self.notes),
            "kinds": dict(self.kinds),
            "categories": dict(self.categories),
            "files": self.files,
            "ignored": self.ignored,
            "duplicate_ids": self.duplicate_ids,
        }


def read_records(
    sources: Sequence[str | PathLike[str]] | str | PathLike[str],
    *,
    split: str | None = None,
    limit: int | None = None,
    need: Need | None = None,
    on_bad: OnBad = "raise",
    report: ReadReport | None = None,
) -> Iterator[Record]:
    """Stream the records of files, folders and data sets (`owner/name[:split]`), in the order given.

    Args:
        sources: where to read; all are looked up before the first row is read.
        split: the split of data sets that do not name one; `train` if not given.
        limit: stop after so many records in all.
        need: what a record must have to be of use (`exchanges`: an answer below its prompt); other rows are skipped.
        on_bad: what a row that is not valid JSON or UTF-8 does: raise, or be counted.
        report: filled while reading.
    """
    if isinstance(sources, str | PathLike):
        sources = [sources]
    if not sources:
        raise ValueError("no data: name at least one file, folder or data set")
    if on_bad not in ("raise", "skip"):
        raise ValueError(f"on_bad is {on_bad!r}: it can be 'raise' or 'skip'")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: it must be at least 1")
    found = [find_source(str(source), split) for source in sources]
    return _stream(found, limit, need, on_bad, ReadReport() if report is None else report)


def _stream(
    sources: list[Source], limit: int | None, need: Need | None, on_bad: OnBad, report: ReadReport
) -> Iterator[Record]:
    given = 0
    for source in sources:
        before = ReadReport()  # this source's own counts, for its own error
        report.ignored.extend(map(str, source.ignored))
        for record in _read_source(source, need, on_bad, report, before):
            yield record
            given += 1
            if given == limit:
                return
        if not before.used:
            why = "; ".join(before.lines()[1:]) or "it is empty"
            raise ValueError(f"{source.name}: no usable row among {before.rows}: {why}")


def _read_source(
    source: Source, need: Need | None, on_bad: OnBad, report: ReadReport, own: ReadReport
) -> Iterator[Record]:
    file, seen = "", set[int]()
    for row in read_rows(source):
        if row.file != file:
            file, seen = row.file, set()
            report.files.append(file)
        report.rows += 1
        own.rows += 1
        record = _usable(row, need, on_bad, (report, own))
        if record is None:
            continue
        if has_id(row.value):
            known = len(seen)
            seen.add(hash(record.id))
            report.duplicate_ids += len(seen) == known
        report.use(record)
        own.use(record)
        yield record


def _has(record: Record, need: Need) -> bool:
    """Token ids of an answer are an answer, whether or not its text was logged as well."""
    if need == "exchanges":
        return any(record.exchanges())
    return bool(getattr(record, need)) or (need == "answers" and bool(record.prompt_token_ids and record.token_ids))


def _usable(row: RawRow, need: Need | None, on_bad: OnBad, reports: Iterable[ReadReport]) -> Record | None:
    place = f"{row.file} row {row.number}"
    try:
        if row.problem:
            if on_bad == "raise":
                raise ValueError(
                    f"{row.file}: row {row.number} is {row.problem}; mend it, or skip such rows "
                    "(--on_bad skip, where a command takes it)"
                )
            raise Unusable(row.problem.split(" (")[0].split(" at ")[0].split(" in ")[0], row.problem)
        notes: list[str] = []
        record = parse(row.value, row.file, row.number, f"{stem_of(row.file)}-{row.number}", notes.append)
        if need and not _has(record, need):
            raise Unusable(f"no {need} in it")
    except Unusable as unusable:
        for report in reports:
            report.skip(unusable.reason, f"{place} ({unusable.detail})" if unusable.detail else place)
        return None
    for report in reports:
        for note in notes:
            report.note(note, place)
    return record
