"""What every store on disk is, whatever its kind: a folder of parts, and store.json, which says what they are.

    store.json   format and kind, whom the store fits, counts, provenance, and of every part its file, type, shape, size
                 and checksum
    *            the parts: raw arrays, or bytes that a library reads

A store is whole or refused in one line. It is written beside its place (`unfinished`) and renamed into it; a change is
published by replacing store.json, and no file that it names is written twice. One writer at a time, by a lock that dies
with its process. What the parts of a kind mean is not known here (store.py: rest, dresd_store.py: dresd).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from draftsmith.infer.files.atomic import write_json

# The layout of each kind, counted for itself.
FORMATS = {"rest": 1, "dresd": 2}
MANIFEST = "store.json"
LOCK = ".lock"
BLOCK = 1 << 20
Check = Literal["sizes", "checksums"]


@dataclass(frozen=True, slots=True)
class Part:
    """One file: an array of `dtype` and `shape`, or bytes where there is no dtype."""

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
    """The parts of the store as a whole, and those of its segments, out of what store.json says."""
    groups = [said.get("parts", {}), *(segment["parts"] for segment in said.get("segments", ()))]
    return [part for group in groups for part in parts_from_json(group).values()]


def figures(said: dict[str, Any]) -> dict[str, Any]:
    """Kind, counts and size of a store, out of what store.json says."""
    size = sum(part.bytes for part in all_parts(said))
    return {"kind": said["kind"], **said["counts"], "bytes": size,
            "bytes_per_token": size / max(said["counts"]["tokens"], 1)}  # fmt: skip


def unfinished(out: Path) -> Path:
    """Where the store that is to be at `out` is built; what a killed build leaves there, the next one goes on with."""
    return out.with_name(out.name + ".part")


def read_manifest(path: str | Path, kind: str = "") -> dict[str, Any]:
    """What store.json says, if this version reads it and it is of `kind`; one clear line where not."""
    path = Path(path).expanduser()
    where = path / MANIFEST
    try:
        said = json.loads(where.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        if unfinished(path).is_dir():
            raise ValueError(
                f"{path}: its building was not finished ({unfinished(path)} is kept): run it again"
            ) from error
        raise ValueError(f"{path} is no store: there is no {MANIFEST} in it") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} is damaged: it is not JSON") from error
    if not isinstance(said, dict) or "format" not in said or "kind" not in said:
        raise ValueError(f"{where} is no store's description")
    if kind and said["kind"] != kind:
        raise ValueError(f"{path} is a {said['kind']} store, where one of kind {kind} is needed")
    if said["kind"] not in FORMATS:
        raise ValueError(f"{path} is a store of kind {said['kind']!r}, which this draftsmith does not know: update it")
    known = FORMATS[said["kind"]]
    if said["format"] != known:
        mend = "build it again" if isinstance(said["format"], int) and said["format"] < known else "update it"
        raise ValueError(f"{where} has format {said['format']}, and this draftsmith reads {known}: {mend}")
    try:
        figures(said)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{where} is damaged: {error}") from error
    return said


def write_manifest(folder: Path, kind: str, said: dict[str, Any]) -> None:
    """Publish: from now on the folder is what `said` says."""
    write_json(folder / MANIFEST, {"format": FORMATS[kind], "kind": kind, **said})


def check_parts(path: Path, parts: Iterable[Part], check: Check = "sizes") -> None:
    """Every part is there and whole; ValueError names the first that is not. Sizes alone miss what was altered."""
    for part in parts:
        file = path / part.file
        try:
            size = file.stat().st_size
        except FileNotFoundError as error:
            raise ValueError(f"{file} is missing: the store {path} is not whole") from error
        if size != part.bytes:
            raise ValueError(f"{file} has {size} bytes, not {part.bytes}: the store is not whole")
        if check == "checksums" and checksum(file) != part.sha256:
            raise ValueError(f"{file} is not what was written (its checksum differs): build again")


def map_part(path: Path, part: Part) -> np.ndarray:
    """The array of a file, mapped and read-only: a plain array, since numpy's own class for maps makes every slice
    several times dearer."""
    if not part.bytes:
        return np.zeros(part.shape, part.dtype)
    return np.asarray(np.memmap(path / part.file, dtype=part.dtype, mode="r", shape=part.shape))


def checksum(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_array(folder: Path, file: str, array: np.ndarray) -> Part:
    array = np.ascontiguousarray(array)
    part = write_bytes(folder, file, array.reshape(-1).view(np.uint8).data)
    return replace(part, dtype=array.dtype.str, shape=array.shape)


def write_bytes(folder: Path, file: str, data: memoryview) -> Part:
    """A whole file, or none."""
    beside = folder / f".{file}.part"
    with beside.open("wb") as written:
        written.write(data)
        written.flush()
        os.fsync(written.fileno())
    os.replace(beside, folder / file)
    return Part(file, len(data), hashlib.sha256(data).hexdigest())


def part_of(folder: Path, file: str) -> Part:
    """A file that a library wrote, as a part."""
    return Part(file, (folder / file).stat().st_size, checksum(folder / file))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for writing; it is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder} is being written by another process: wait until it has ended") from error
        yield
