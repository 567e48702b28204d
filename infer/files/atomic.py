"""A file is whole or it is not there: text is written beside its place and renamed into it.

Knows nothing of what the text means. A name that ends in .gz is compressed, without a time stamp, so that the same
content gives the same bytes.
"""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


@contextmanager
def written_beside(path: Path) -> Iterator[TextIO]:
    """A text file that takes the name `path` only when the block ends well."""
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


def write_json(path: Path, value: Any) -> None:
    with written_beside(path) as text:
        text.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON Lines, one row a line."""
    with written_beside(path) as text:
        for row in rows:
            text.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(row number from 1, value) of JSON Lines; blank lines are passed over; what does not parse is a ValueError."""
    number = 0
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8")
            if path.name.endswith(".gz")
            else path.open(encoding="utf-8") as text
        ):
            for number, line in enumerate(text, start=1):
                if line.strip():
                    yield number, json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, row {number}: not JSON ({error.msg}, column {error.colno})") from error
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}, after row {number}: cannot be read ({error})") from error
