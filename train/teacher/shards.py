"""A cache of a frozen target on disk: records of corpus positions in shards, written once and read at random.

    FACTS.json           what it was built from (identity); when finished, every shard's checksum
    shard-00000.bin      the records of the first positions, in corpus order
    shard-00000.sha256   its checksum, written before the shard gets its name

A killed build resumes after its last complete shard. The size is printed first, and refused if the disk is too full.
cache.py keeps the target's distributions this way, feature_cache.py its states.

Legend: N positions.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from draftsmith.infer.files.atomic import write_json, written_beside
from draftsmith.infer.files.workers import Note, Work, Workers
from draftsmith.train.data.corpus import Corpus
from draftsmith.train.drafts.exits import TrainContext

# What a mismatch is called, for the fields of an identity that are hashes.
HASHED = {"target": "other weights", "corpus": "other data, template or max_length"}


class CacheIdentity(Protocol):
    """What a cache was built from, as a dataclass; a cache is used only where all of it matches."""

    @property
    def positions(self) -> int: ...

    @property
    def record(self) -> np.dtype[Any]:
        """One position on disk."""
        ...

    @property
    def shard_positions(self) -> int: ...


@dataclass(frozen=True, slots=True)
class CacheKind:
    """`noun`: what messages call it; `file`: its facts; `names`: what the option that names it can be."""

    noun: str
    file: str
    names: str

    @property
    def called(self) -> str:
        return f"{'an' if self.noun[0] in 'aeiou' else 'a'} {self.noun}"


def shard_ranges(identity: CacheIdentity) -> list[range]:
    """The positions of each shard."""
    size = identity.shard_positions
    starts = range(0, identity.positions, size)
    return [range(start, min(start + size, identity.positions)) for start in starts]


def cache_bytes(identity: CacheIdentity) -> int:
    return identity.positions * identity.record.itemsize


def weights_hash(model: Any) -> str:
    """Of all weights."""
    weights = hashlib.sha256()
    for name, weight in model.named_parameters():
        weights.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        weights.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return weights.hexdigest()


def check_copies(run: TrainContext, identity: Any) -> None:
    """ValueError where a worker has loaded another target or corpus than the cache is of."""
    for name, found in (("target", weights_hash(run.target)), ("corpus", corpus_hash(run.corpus))):
        if found != getattr(identity, name):
            raise ValueError(f"a worker has {HASHED[name]} than the process that began the cache")


def corpus_hash(corpus: Corpus) -> str:
    """Of all tokens and of what is learned of them."""
    text = hashlib.sha256()
    for array in (corpus.offsets, corpus.tokens, corpus.masks):
        text.update(np.ascontiguousarray(array).data)
    return text.hexdigest()


# Makes the records of some positions; and what a worker calls to get that, with the cache's identity.
Records = Callable[[range], np.ndarray]
OpenRecords = Callable[[TrainContext, Any], Records]


def built(
    folder: Path, identity: Any, kind: CacheKind, run: TrainContext, open_records: OpenRecords, first: bool
) -> ShardReader:
    """The finished cache in `folder`, built or completed by the `first` process if needed."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: {kind.names}")
    if first and _begin(folder, identity, kind):
        with run.workers() as workers:
            _build(folder, identity, kind, run, open_records, workers)
    if not (folder / kind.file).is_file():
        raise ValueError(f"{folder} does not exist yet: build it on one device before training on several")
    return ShardReader(folder, identity, kind)


def check_identity(folder: Path, wanted: Any, kind: CacheKind) -> dict[str, Any]:
    """The facts of the cache in `folder`; ValueError if its identity is another."""
    path = folder / kind.file
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = facts["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not describe {kind.called}") from error
    other = [key for key, value in asdict(wanted).items() if found.get(key) != value]
    if other:
        listed = ", ".join(HASHED.get(key, f"{key} {found.get(key)}, now {getattr(wanted, key)}") for key in other)
        raise ValueError(f"{folder} is {kind.called} of something else ({listed}): give another folder")
    return facts


def _begin(folder: Path, identity: Any, kind: CacheKind) -> bool:
    """Whether anything is left to build; prints the disk space it takes and checks that it is free."""
    if (folder / kind.file).is_file():
        if check_identity(folder, identity, kind).get("state") == "finished":
            return False
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no {kind.noun}: give a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = sum(path.stat().st_size for path in folder.glob("shard-*.bin"))
        free, takes = shutil.disk_usage(folder).free, cache_bytes(identity)
        print(f"{kind.noun} {folder}: {identity.positions:,} positions x {identity.record.itemsize} bytes = "
              f"{_size(takes)} ({_size(there)} there already, {_size(free)} free)", file=sys.stderr)  # fmt: skip
        if free < takes - there:
            raise ValueError(f"{folder}: the {kind.noun} takes {_size(takes)}, and {_size(free)} are free")
        write_json(folder / kind.file, {"identity": asdict(identity), "state": "building"})
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to: {error.strerror}") from error
    return True


def _build(
    folder: Path, identity: Any, kind: CacheKind, run: TrainContext, open_records: OpenRecords, workers: Workers
) -> None:
    began, done = time.monotonic(), 0
    ranges = shard_ranges(identity)
    missing = {number: at for number, at in enumerate(ranges) if not _whole(folder, number, len(at), identity)}
    there = identity.positions - sum(map(len, missing.values()))
    assert workers.in_process or run.reload is not None
    reload = None if workers.in_process else run.reload
    writer = _ShardWriter(folder.absolute(), identity, reload or (lambda: run), reload is not None, open_records)
    for number, _ in workers.map(writer, ((number, (number, at)) for number, at in missing.items()), shared=folder):
        if not _whole(folder, number, len(ranges[number]), identity):
            raise ValueError(f"{shard_path(folder, number)} was not written: run the same command again")
        done += len(ranges[number])
        pace = done / (time.monotonic() - began)
        left = (identity.positions - there - done) / pace
        print(f"{kind.noun}: {there + done:,} of {identity.positions:,} positions, {pace:,.0f}/s, "
              f"{left:,.0f} s left", file=sys.stderr, flush=True)  # fmt: skip
    hashes = [shard_path(folder, number).with_suffix(".sha256").read_text() for number in range(len(ranges))]
    write_json(folder / kind.file, {"identity": asdict(identity), "state": "finished", "sha256": hashes})


@dataclass(frozen=True, slots=True)
class _ShardWriter:
    """What a worker calls before its first shard. `run`: gives it the target and the corpus; `reloaded`: its own
    copies of them."""

    folder: Path
    identity: Any
    run: Callable[[], TrainContext]
    reloaded: bool
    open_records: OpenRecords

    def __call__(self) -> Work:
        run = self.run()
        if self.reloaded:
            check_copies(run, self.identity)
        records = self.open_records(run, self.identity)

        def work(task: tuple[int, range], note: Note) -> None:
            number, positions = task
            _write(shard_path(self.folder, number), records(positions))
            note(len(positions), len(positions))

        return work


def _whole(folder: Path, number: int, positions: int, identity: CacheIdentity) -> bool:
    path = shard_path(folder, number)
    sums = path.with_suffix(".sha256")
    size = positions * identity.record.itemsize
    return path.is_file() and path.stat().st_size == size and sums.is_file() and sums.read_text() == file_hash(path)


def _write(path: Path, records_N: np.ndarray) -> None:
    """Writes beside its place, checksum first, then renames: an existing shard is complete."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(records_N.data)
            file.flush()
            os.fsync(file.fileno())
        with written_beside(path.with_suffix(".sha256")) as text:
            text.write(file_hash(part))
        os.replace(part, path)
    except OSError as error:
        raise ValueError(
            f"{path} could not be written ({error.strerror}); free some space and run the same command again"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def samples_of(first_S: np.ndarray, positions: range) -> range:
    """The samples in which `positions` lie. `first_S`: each sample's first position."""
    low = int(np.searchsorted(first_S, positions.start, side="right")) - 1
    return range(max(low, 0), int(np.searchsorted(first_S, positions.stop, side="left")))


class ShardReader:
    """Reads a finished cache after verifying its checksums."""

    def __init__(self, folder: Path, identity: Any, kind: CacheKind) -> None:
        facts = check_identity(folder, identity, kind)
        if facts.get("state") != "finished":
            raise ValueError(f"{folder} is not finished: build it on one device before training on several")
        self._record, self._size = identity.record, identity.shard_positions
        self._shards = []
        for number, positions in enumerate(shard_ranges(identity)):
            path = shard_path(folder, number)
            if not path.is_file() or file_hash(path) != facts["sha256"][number]:
                raise ValueError(f"{path} is damaged or missing: delete {folder}, and it will be rebuilt")
            self._shards.append(np.memmap(path, dtype=identity.record, mode="r", shape=(len(positions),)))

    def __getitem__(self, positions_N: np.ndarray) -> np.ndarray:
        """[N] records."""
        numbers_N, within_N = np.divmod(positions_N, self._size)
        records_N = np.empty(len(positions_N), dtype=self._record)
        for number in np.unique(numbers_N):
            here_N = numbers_N == number
            records_N[here_N] = self._shards[number][within_N[here_N]]
        return records_N


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.bin"


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
