"""Files that are whole or absent: atomic writes (beside the path, then renamed), and JSON readers with clear errors.

A name that ends in .gz is compressed, without a time stamp, so that equal content gives equal bytes.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar
from uuid import uuid4

T = TypeVar("T")


@contextmanager
def written_beside(path: Path) -> Iterator[TextIO]:
    """A text file that gets its name `path` only if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as raw:
            zipped = path.name.endswith(".gz")
            packed: Any = gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) if zipped else raw
            text = io.TextIOWrapper(packed, encoding="utf-8", newline="\n")
            try:
                yield text
            finally:
                text.flush()
                text.detach()
                if zipped:
                    packed.close()
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A new folder that gets its name `path` only if the block succeeds; an empty folder there is replaced.

    ValueError where it cannot be written. The name beside is random: a process id can be the same on two nodes.
    """
    beside = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        beside.mkdir(parents=True)
        yield beside
        os.replace(beside, path)
    except OSError as error:
        raise ValueError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    with written_beside(path) as text:
        text.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON Lines, one row a line."""
    with written_beside(path) as text:
        for row in rows:
            text.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(row number from 1, value) of JSON Lines, blank lines skipped; ValueError for a line that does not parse."""
    number = 0
    try:
        opened = gzip.open if path.name.endswith(".gz") else open
        with opened(path, "rt", encoding="utf-8") as text:
            for number, line in enumerate(text, start=1):
                if line.strip():
                    yield number, json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, row {number}: not JSON ({error.msg}, column {error.colno})") from error
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}, after row {number}: cannot be read ({error})") from error


def load_versioned(
    path: str | Path, kind: str, version: int, parse: Callable[[dict[str, Any]], T], written_by: str
) -> T:
    """`parse` applied to a JSON object with this "kind" and "format"; ValueError in one line for any other file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict) or value.get("kind") != kind:
        raise ValueError(f"{path} is not a {kind} file: write one with {written_by}")
    if value.get("format") != version:
        raise ValueError(
            f"{path} has format {value.get('format')}; this version reads {version}: run {written_by} again"
        )
    try:
        return parse(value)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a whole {kind} file: {error}") from None
