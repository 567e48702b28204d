"""From a source (a file, a folder, a data set on the Hub) to raw rows with their numbers, streamed.

Containers: JSON (an array, or an object with one list), JSONL, Parquet, plain text, each of the text ones also under
.gz or .zst. A row that cannot be decoded is handed on as a problem with its number; what a row means is not known here
(record_formats.py).

zstandard's own reader ends a truncated frame without a word, so the frame's end is checked here.
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

from draftsmith.infer.files.locations import may_be_on_hub
from draftsmith.infer.text.record_formats import detect

JSONL = (".jsonl", ".ndjson")
TEXT = (
    ".txt", ".md", ".rst", ".py", ".c", ".cc", ".cpp", ".h", ".hpp", ".java", ".js", ".ts", ".go", ".rs", ".sh",
    ".html", ".css", ".tex", ".yaml", ".yml", ".toml", ".sql", ".rb",
)  # fmt: skip
COMPRESSED = (".gz", ".zst")
KNOWN = (".json", *JSONL, ".parquet", *TEXT)
HUB_NAME = re.compile(r"(?P<name>[^:]+)(:(?P<split>[\w.\[\]%:+-]+))?")
CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as it stood in its file; `problem` tells why there is no value. Rows (of JSONL: lines) count from 1."""

    file: str
    number: int
    value: Any = None
    problem: str = ""


@dataclass(slots=True)
class Source:
    """What a person named: files in reading order (with those passed over), or a data set on the Hub."""

    name: str
    files: list[Path] = field(default_factory=list)
    ignored: list[Path] = field(default_factory=list)
    hub: str = ""
    split: str = ""


def suffix_of(path: Path) -> str:
    """The suffix that tells the container, compression aside."""
    path = Path(path.stem) if path.suffix.lower() in COMPRESSED else path
    return path.suffix.lower()


def stem_of(file: str) -> str:
    """The file's name without its container's suffixes."""
    path = Path(file)
    path = Path(path.stem) if path.suffix.lower() in COMPRESSED else path
    return path.stem if path.suffix.lower() in KNOWN else path.name


def hub_name(name: str) -> re.Match[str] | None:
    """`owner/name[:split]`, where it cannot be meant as a path: no known suffix, no folder of the owner's name."""
    match = HUB_NAME.fullmatch(name)
    if match is None or suffix_of(Path(name)) in KNOWN or Path(name).suffix in COMPRESSED:
        return None
    return match if may_be_on_hub(match["name"]) else None


def find_source(name: str, split: str | None = None) -> Source:
    """Look `name` up, on this machine only; a path that does not exist is never looked for elsewhere."""
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(name, path)
    if path.exists():
        if suffix_of(path) not in KNOWN:
            raise ValueError(f"{name}: unknown kind of file; known are {', '.join(KNOWN)}, and {' '.join(COMPRESSED)}")
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
        raise ValueError(f"{name}: no file in this folder can be read; known are {', '.join(KNOWN)}")
    return source


def read_rows(source: Source) -> Iterator[RawRow]:
    """All rows of a source, one at a time."""
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
    except OSError as error:
        raise ValueError(f"{path}: cannot be read after row {number}: {error}") from error
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{path}: the compressed data is damaged after row {number}: {error}") from error


def _open(path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_Zstd(path), CHUNK)
    return open(path, "rb")


class _Zstd(io.RawIOBase):
    """The frames of a .zst file, one after the other; a frame that does not end is an error."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._new = lambda: zstandard.ZstdDecompressor().decompressobj()
        self._file = open(path, "rb")  # noqa: SIM115 - closed in close()
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            if data or self._frame is None or self._frame.eof:
                data = data or self._file.read(CHUNK)
                if not data:
                    return 0
                self._frame = self._new()
            else:
                data = self._file.read(CHUNK)
                if not data:
                    raise EOFError("a frame has no end")
            try:
                self._ready = self._frame.decompress(data)
            except self._error as error:
                raise EOFError(str(error)) from error
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _read_lines(path: Path, file: BinaryIO) -> Iterator[RawRow]:
    """JSONL: a line is a row; empty lines are none."""
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
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
    """A JSON file or a plain text, which is one document."""
    data = data.removeprefix(b"\xef\xbb\xbf")
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
        if error.msg == "Extra data":  # JSONL under the wrong name
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
    """An array's items; the items of an object's one list, unless the object is itself a row."""
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
            f"{source.name}: data sets on the Hub need the extra `train`: pip install 'draftsmith[train]'"
        ) from error
    try:
        rows = datasets.load_dataset(source.hub, split=source.split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield RawRow(source.name, number, dict(row))
    except (OSError, ValueError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{source.name}: the data set's split {source.split} cannot be read: {first_line}") from error
