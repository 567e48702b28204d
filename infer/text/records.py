"""The reader behind every `--data`: streams records from files, folders and data sets.

    report = ReadReport()
    for record in read_records(["questions.jsonl", "logs/"], report=report): ...

No row is dropped silently: the report counts what was skipped, why and where.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal

from draftsmith.infer.text.read_files import RawRow, Source, find_source, read_rows, stem_of
from draftsmith.infer.text.record import Message, Record, Unusable
from draftsmith.infer.text.record_formats import has_id, parse

__all__ = ["Message", "ReadReport", "Record", "read_records"]

OnBad = Literal["raise", "skip"]
Need = Literal["questions", "answers", "documents", "exchanges"]
SHOWN = 3


@dataclass(slots=True)
class Tally:
    """How often something occurred, and the first places."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        self.count += 1
        if len(self.places) < SHOWN:
            self.places.append(place)


@dataclass(slots=True)
class ReadReport:
    """Counts of a read: `rows` were read, `used` became records, the others are in `skipped`."""

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

    def take_notes(self, notes: dict[str, Tally]) -> None:
        """Add the notes of another report, on rows that come after this one's."""
        for reason, tally in notes.items():
            own = self.notes.setdefault(reason, Tally())
            own.count += tally.count
            own.places = [*own.places, *tally.places][:SHOWN]

    def use(self, record: Record) -> None:
        self.used += 1
        self.kinds[record.kind] += 1
        self.categories[record.category] += 1

    def lines(self) -> list[str]:
        """The report as text, one fact per line."""
        lines = [f"{self.rows} rows read, {self.used} used, {self.rows - self.used} skipped"]
        for title, tallies in (("skipped", self.skipped), ("note", self.notes)):
            for reason, tally in tallies.items():
                more = ", ..." if tally.count > len(tally.places) else ""
                lines.append(f"{title}: {tally.count} x {reason}: {', '.join(tally.places)}{more}")
        if self.duplicate_ids:
            lines.append(f"note: {self.duplicate_ids} rows repeat an id of their file; all are kept")
        if self.ignored:
            lines.append(f"note: {len(self.ignored)} files of an unknown kind were ignored: {self.ignored[0]}, ...")
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
        sources: all are looked up before the first row is read.
        split: for data sets that do not name one (default: `train`).
        limit: maximum number of records in all.
        need: what a record must have (`exchanges`: an answer with its prompt); rows without it are skipped.
        on_bad: raise on a row that is not valid JSON or UTF-8, or skip and count it.
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
        own = ReadReport()  # of this source alone, for its error
        report.ignored.extend(map(str, source.ignored))
        for record in _read_source(source, need, on_bad, (report, own)):
            yield record
            given += 1
            if given == limit:
                return
        if not own.used:
            why = "; ".join(own.lines()[1:]) or "it is empty"
            raise ValueError(f"{source.name}: no usable row among {own.rows}: {why}")


def _read_source(
    source: Source, need: Need | None, on_bad: OnBad, reports: tuple[ReadReport, ReadReport]
) -> Iterator[Record]:
    file, seen = "", set[int]()
    for row in read_rows(source):
        if row.file != file:
            file, seen = row.file, set()
            reports[0].files.append(file)
        for report in reports:
            report.rows += 1
        place = f"{row.file} row {row.number}"
        notes: list[str] = []
        try:
            record = _parse(row, need, on_bad, notes)
        except Unusable as unusable:
            for report in reports:
                report.skip(unusable.reason, f"{place} ({unusable.detail})" if unusable.detail else place)
            continue
        if has_id(row.value):
            reports[0].duplicate_ids += hash(record.id) in seen
            seen.add(hash(record.id))
        for report in reports:
            report.use(record)
            for note in notes:
                report.note(note, place)
        yield record


def _parse(row: RawRow, need: Need | None, on_bad: OnBad, notes: list[str]) -> Record:
    if row.problem:
        if on_bad == "raise":
            raise ValueError(
                f"{row.file}: row {row.number} is {row.problem}; correct it, or skip such rows "
                "(--on_bad skip, where a command takes it)"
            )
        raise Unusable(row.problem.split(" (")[0].split(" at ")[0].split(" in ")[0], row.problem)
    record = parse(row.value, row.file, row.number, f"{stem_of(row.file)}-{row.number}", notes.append)
    if need and not _has(record, need):
        raise Unusable(f"no {need}")
    return record


def _has(record: Record, need: Need) -> bool:
    """Whether `record` has what is needed. Token ids of an answer count as an answer, with or without its text."""
    if need == "exchanges":
        return any(record.exchanges())
    return bool(getattr(record, need)) or (need == "answers" and bool(record.prompt_token_ids and record.token_ids))
