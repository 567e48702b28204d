"""What all stores on disk have in common: a folder of parts, and store.json, which describes them.

    store.json   format and kind, the tokenizer and target it fits, counts, provenance, and for each part its file,
                 type, shape, size and checksum
    *            the parts: raw arrays, or bytes that a library reads

A store is complete or refused with one line. It is written beside its destination (`unfinished`) and renamed; a change
is published by replacing store.json, and no file that store.json names is written twice. One writer at a time holds a
lock that ends with its process.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from draftsmith.infer.files.atomic import write_json

# The format version of each kind.
FORMATS = {"rest": 1, "dresd": 2}
MANIFEST = "store.json"
LOCK = ".lock"
Check = Literal["sizes", "checksums"]


@dataclass(frozen=True, slots=True)
class Part:
    """One file: an array of `dtype` and `shape`, or bytes if there is no dtype."""

    file: str
    bytes: int
    sha256: str
    dtype: str = ""
    shape: tuple[int, ...] = ()


def parts_from_json(value: dict[str, Any]) -> dict[str, Part]:
    return {name: Part(**{**part, "shape": tuple(part.get("shape", ()))}) for name, part in value.items()}


def parts_to_json(parts: dict[str, Part]) -> dict[str, Any]:
    return {name: asdict(part) for name, part in parts.items()}


def all_parts(said: dict[str, Any]) -> list[Part]:
    """The parts of the store as a whole and of its segments, from a parsed store.json."""
    groups = [said.get("parts", {}), *(segment["parts"] for segment in said.get("segments", ()))]
    return [part for group in groups for part in parts_from_json(group).values()]


def figures(said: dict[str, Any]) -> dict[str, Any]:
    """Kind, counts and size of a store, from a parsed store.json."""
    size = sum(part.bytes for part in all_parts(said))
    return {"kind": said["kind"], **said["counts"], "bytes": size,
            "bytes_per_token": size / max(said["counts"]["tokens"], 1)}  # fmt: skip


def unfinished(out: Path) -> Path:
    """The folder in which the store for `out` is built; a killed build resumes from it."""
    return out.with_name(out.name + ".part")


def read_manifest(path: str | Path, kind: str = "") -> dict[str, Any]:
    """store.json, parsed; ValueError if it is damaged, of another kind than `kind`, or of an unknown format."""
    path = Path(path).expanduser()
    where = path / MANIFEST
    try:
        said = json.loads(where.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        if unfinished(path).is_dir():
            raise ValueError(
                f"{path} does not exist: its build was not finished; run it again to resume from {unfinished(path)}"
            ) from error
        raise ValueError(f"{path} is not a store: it has no {MANIFEST}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} is damaged: not JSON") from error
    if not isinstance(said, dict) or "format" not in said or "kind" not in said:
        raise ValueError(f"{where} does not describe a store: it lacks `format` or `kind`")
    if kind and said["kind"] != kind:
        raise ValueError(f"{path} is a {said['kind']} store; a {kind} store is needed")
    if said["kind"] not in FORMATS:
        raise ValueError(f"{path} is a store of the unknown kind {said['kind']!r}: update draftsmith")
    known = FORMATS[said["kind"]]
    if said["format"] != known:
        older = isinstance(said["format"], int) and said["format"] < known
        fix = "build the store again" if older else "update draftsmith"
        raise ValueError(f"{where} has format {said['format']}, and this draftsmith reads {known}: {fix}")
    try:
        figures(said)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{where} is damaged: {error}") from error
    return said


def write_manifest(folder: Path, kind: str, said: dict[str, Any]) -> None:
    """Publish a new store.json."""
    write_json(folder / MANIFEST, {"format": FORMATS[kind], "kind": kind, **said})


def check_parts(path: Path, parts: Iterable[Part], check: Check = "sizes") -> None:
    """Check that every part is complete; ValueError names the first that is not. Sizes alone miss altered bytes."""
    for part in parts:
        file = path / part.file
        try:
            size = file.stat().st_size
        except FileNotFoundError as error:
            raise ValueError(f"{file} is missing: the store is incomplete; build it again") from error
        if size != part.bytes:
            raise ValueError(f"{file} has {size} bytes, not {part.bytes}: the store is incomplete; build it again")
        if check == "checksums" and checksum(file) != part.sha256:
            raise ValueError(f"{file} was altered (its checksum differs): build the store again")


def map_part(path: Path, part: Part) -> np.ndarray:
    """The array of a file, mapped read-only. As a plain array: slicing np.memmap is several times slower."""
    if not part.bytes:
        return np.zeros(part.shape, part.dtype)
    return np.asarray(np.memmap(path / part.file, dtype=part.dtype, mode="r", shape=part.shape))


def checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_array(folder: Path, file: str, array: np.ndarray) -> Part:
    """Write a whole file, or none."""
    array = np.ascontiguousarray(array)
    data = array.reshape(-1).view(np.uint8).data
    beside = folder / f".{file}.part"
    with beside.open("wb") as written:
        written.write(data)
        written.flush()
        os.fsync(written.fileno())
    os.replace(beside, folder / file)
    return Part(file, len(data), hashlib.sha256(data).hexdigest(), array.dtype.str, array.shape)


def part_of(folder: Path, file: str) -> Part:
    """The part for a file that a library wrote."""
    return Part(file, (folder / file).stat().st_size, checksum(folder / file))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder for writing; it is created if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder} is being written by another process: wait until that ends") from error
        yield
