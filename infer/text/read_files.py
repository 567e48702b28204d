"""Streams the raw rows of files, folders and data sets on the Hub.

Containers: JSON (an array, or an object with one list), JSONL, plain text, each also as .gz or .zst, and Parquet. A
row that cannot be decoded is passed on with its problem.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from draftsmith.infer.files.errors import first_line
from draftsmith.infer.files.locations import may_be_on_hub
from draftsmith.infer.text.record_formats import detect

JSONL = (".jsonl", ".ndjson")
TEXT = (
    ".txt", ".md", ".rst", ".py", ".c", ".cc", ".cpp", ".h", ".hpp", ".java", ".js", ".ts", ".go", ".rs", ".sh",
    ".html", ".css", ".tex", ".yaml", ".yml", ".toml", ".sql", ".rb",
)  # fmt: skip
COMPRESSED = (".gz", ".zst")
KNOWN = (".json", *JSONL, ".parquet", *TEXT)
BOM = b"\xef\xbb\xbf"
HUB_NAME = re.compile(r"(?P<name>[^:]+)(:(?P<split>[\w.\[\]%:+-]+))?")


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row of a file; `problem` says why it has no value. Rows (in JSONL: lines) are numbered from 1."""

    file: str
    number: int
    value: Any = None
    problem: str = ""


@dataclass(slots=True)
class Source:
    """One entry of `--data`: files in reading order (and those ignored), or a data set on the Hub."""

    name: str
    files: list[Path] = field(default_factory=list)
    ignored: list[Path] = field(default_factory=list)
    hub: str = ""
    split: str = ""


def suffix_of(path: Path) -> str:
    """The suffix of the container, without that of the compression."""
    return _uncompressed(path).suffix.lower()


def stem_of(file: str) -> str:
    """The file's name without the suffixes of container and compression."""
    path = _uncompressed(Path(file))
    return path.stem if path.suffix.lower() in KNOWN else path.name


def _uncompressed(path: Path) -> Path:
    return Path(path.stem) if path.suffix.lower() in COMPRESSED else path


def hub_name(name: str) -> re.Match[str] | None:
    """`owner/name[:split]`, unless it looks like a path: a known suffix, or a folder of the owner's name."""
    match = HUB_NAME.fullmatch(name)
    if match is None or suffix_of(Path(name)) in KNOWN or Path(name).suffix in COMPRESSED:
        return None
    return match if may_be_on_hub(match["name"]) else None


def find_source(name: str, split: str | None = None) -> Source:
    """The files or the data set that `name` means. Looks at this machine only; missing paths raise."""
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(name, path)
    if path.exists():
        if suffix_of(path) not in KNOWN:
            raise ValueError(
                f"{name}: unknown kind of file; known are {', '.join(KNOWN)} (also {', '.join(COMPRESSED)})"
            )
        return Source(name, [path])
    match = hub_name(name)
    if match is None:
        raise ValueError(f"{name}: no such file or folder (a data set on the Hub is written owner/name[:split])")
    return Source(name, hub=match["name"], split=match["split"] or split or "train")


def _folder(name: str, folder: Path) -> Source:
    source = Source(name)
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        (source.files if suffix_of(path) in KNOWN else source.ignored).append(path)
    if not source.files:
        raise ValueError(f"{name}: no file in this folder is of a known kind: {', '.join(KNOWN)}")
    return source


def read_rows(source: Source) -> Iterator[RawRow]:
    """All rows of a source."""
    if source.hub:
        yield from _read_hub(source)
    for path in source.files:
        yield from read_file(path)


def read_file(path: Path) -> Iterator[RawRow]:
    """The rows of one file."""
    suffix = suffix_of(path)
    if suffix == ".parquet":
        yield from _read_parquet(path)
        return
    number = 0
    try:
        with _open(path) as file:
            rows = _read_lines(path, file) if suffix in JSONL else _read_whole(path, file.read(), suffix)
            for row in rows:
                number = row.number
                yield row
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: unreadable or damaged after row {number}: {error}") from error


def _open(path: Path) -> BinaryIO:
    """The uncompressed bytes. pyarrow reads .zst because zstandard's own reader ends a truncated file silently."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 1 << 16)
    return open(path, "rb")


def _read_lines(path: Path, file: BinaryIO) -> Iterator[RawRow]:
    """JSONL: every line that is not empty is a row."""
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(BOM)
        if line.strip():
            yield _read_line(path, number, line)


def _read_line(path: Path, number: int, line: bytes) -> RawRow:
    try:
        return RawRow(str(path), number, json.loads(line.decode()))
    except UnicodeDecodeError as error:
        return RawRow(str(path), number, problem=f"not valid UTF-8 at byte {error.start + 1} of the row")
    except json.JSONDecodeError as error:
        return RawRow(str(path), number, problem=f"not valid JSON ({error.msg}, column {error.colno})")
    except (ValueError, RecursionError) as error:
        return RawRow(str(path), number, problem=f"not valid JSON ({error})")


def _read_whole(path: Path, data: bytes, suffix: str) -> Iterator[RawRow]:
    """The rows of a JSON file, or plain text as one document."""
    data = data.removeprefix(BOM)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        yield RawRow(str(path), 1 if suffix in TEXT else line, problem=f"not valid UTF-8 in line {line}")
        return
    if suffix in TEXT:
        yield RawRow(str(path), 1, {"text": text})
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSONL with the suffix .json
            yield from _read_lines(path, io.BytesIO(data))
        else:
            yield RawRow(str(path), error.lineno, problem=f"not valid JSON ({error.msg}, column {error.colno})")
        return
    except (ValueError, RecursionError) as error:
        yield RawRow(str(path), 1, problem=f"not valid JSON ({error})")
        return
    for number, row in enumerate(_rows_of(value), 1):
        yield RawRow(str(path), number, row)


def _rows_of(value: Any) -> list[Any]:
    """The items of an array, or of an object's only list (unless the object is itself a row)."""
    if isinstance(value, list):
        return value
    if isinstance(value, dict) and detect(value) == "unknown":
        lists = [item for item in value.values() if isinstance(item, list)]
        if len(lists) == 1:
            return lists[0]
    return [value]


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for value in batch.to_pylist():
                    number += 1
                    yield RawRow(str(path), number, value)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file after row {number}: {error}") from error


def _read_hub(source: Source) -> Iterator[RawRow]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{source.name}: reading data sets of the Hub needs the extra `train`: pip install 'draftsmith[train]'"
        ) from error
    try:
        rows = datasets.load_dataset(source.hub, split=source.split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield RawRow(source.name, number, dict(row))
    except (OSError, ValueError) as error:
        reason = f"the data set's split {source.split} cannot be read: {first_line(error)}"
        raise ValueError(f"{source.name}: {reason}") from error
