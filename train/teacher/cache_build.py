"""Builds a teacher cache: the frozen target reads the corpus once, and its distributions go to disk shard by shard.

A killed build resumes after its last complete shard. The size is printed first, and refused if the disk is too full.

Legend: N positions that have a label, K kept tokens, V vocabulary.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from draftsmith.infer.files.atomic import write_json, written_beside
from draftsmith.train.data.batches import IGNORED, assemble, rank
from draftsmith.train.data.corpus import Corpus
from draftsmith.train.data.packing import pack
from draftsmith.train.drafts.exits import TrainContext
from draftsmith.train.teacher.cache import (
    CachedTeacher,
    Identity,
    check_identity,
    file_hash,
    identity_of,
    learned_positions,
    shard_path,
)  # fmt: skip
from draftsmith.train.teacher.live import LiveTeacher

ROWS_AT_ONCE = 4
POSITIONS_AT_ONCE = 256
SMALLEST = 2.0**-24  # float16's smallest: a kept token never has probability 0


def open_or_build(folder: str, run: TrainContext, *, top_k: int, temperature: float) -> CachedTeacher:
    """The cache in `folder`, built or completed first if needed."""
    path = Path(folder).expanduser()
    identity = identity_of(run.target, run.corpus, top_k, temperature)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: a teacher is `live` or the folder of a cache")
    if rank() == 0 and _begin(path, identity):
        _build(path, identity, run)
    if not (path / "teacher.json").is_file():
        raise ValueError(f"{path} does not exist yet: build it on one device before training on several")
    return CachedTeacher(path, identity, run.corpus)


def _begin(folder: Path, identity: Identity) -> bool:
    """Whether anything is left to build; prints the disk space it takes and checks that it is free."""
    if (folder / "teacher.json").is_file():
        if check_identity(folder, identity).get("state") == "finished":
            return False
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no teacher cache: give a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = sum(path.stat().st_size for path in folder.glob("shard-*.bin"))
        free = shutil.disk_usage(folder).free
        each = identity.record.itemsize
        print(f"teacher cache {folder}: {identity.positions:,} positions x {each} bytes = {_size(identity.bytes)} "
              f"({_size(there)} there already, {_size(free)} free)", file=sys.stderr)  # fmt: skip
        if free < identity.bytes - there:
            raise ValueError(f"{folder}: the teacher cache takes {_size(identity.bytes)}, and {_size(free)} are free")
        write_json(folder / "teacher.json", {"identity": asdict(identity), "state": "building"})
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to: {error.strerror}") from error
    return True


def _build(folder: Path, identity: Identity, run: TrainContext) -> None:
    teacher = LiveTeacher(run.target)
    before = learned_positions(run.corpus)
    first_N = before[run.corpus.offsets[:-1]]  # of each sample
    began, done = time.monotonic(), 0
    for number, positions in enumerate(identity.shards):
        path = shard_path(folder, number)
        size = len(positions) * identity.record.itemsize
        sums = path.with_suffix(".sha256")
        if path.is_file() and path.stat().st_size == size and sums.is_file() and sums.read_text() == file_hash(path):
            continue
        low = int(np.searchsorted(first_N, positions.start, side="right")) - 1
        high = int(np.searchsorted(first_N, positions.stop, side="left"))
        records_N = _records(teacher, identity, run, before, positions, range(max(low, 0), high))
        _write(path, records_N)
        done += len(positions)
        pace = done / (time.monotonic() - began)
        left = (identity.positions - positions.stop) / pace
        print(f"teacher cache: {positions.stop:,} of {identity.positions:,} positions, {pace:,.0f}/s, "
              f"{left:,.0f} s left", file=sys.stderr, flush=True)  # fmt: skip
    hashes = [shard_path(folder, number).with_suffix(".sha256").read_text() for number in range(len(identity.shards))]
    write_json(folder / "teacher.json", {"identity": asdict(identity), "state": "finished", "sha256": hashes})


def _records(
    teacher: LiveTeacher, identity: Identity, run: TrainContext, before: np.ndarray, positions: range, samples: range
) -> np.ndarray:
    """[N] records of `positions`, all of which lie in `samples`."""
    corpus: Corpus = run.corpus
    records_N = np.zeros(len(positions), dtype=identity.record)
    packs = pack(corpus.lengths, run.max_length, np.arange(samples.start, samples.stop))
    for start in range(0, len(packs), ROWS_AT_ONCE):
        batch = assemble(corpus, packs[start : start + ROWS_AT_ONCE], run.max_length)
        places_N = batch["places"][batch["labels"] != IGNORED].numpy()
        at_N = before[places_N] - positions.start
        inside_N = (at_N >= 0) & (at_N < len(positions))
        distributions = teacher({name: value.to(run.device) for name, value in batch.items()})
        for first in range(0, len(at_N), POSITIONS_AT_ONCE):
            chunk = slice(first, first + POSITIONS_AT_ONCE)
            kept_N = inside_N[chunk]
            if kept_N.any():
                probs_NV = distributions.chunk(chunk).log_probs(identity.temperature, torch.empty(0)).exp()
                records_N[at_N[chunk][kept_N]] = _record(probs_NV, identity)[kept_N]
    return records_N


def _record(probs_NV: torch.Tensor, identity: Identity) -> np.ndarray:
    """Likeliest tokens first; the tail is computed by zeroing and summing."""
    probs_NK, ids_NK = torch.topk(probs_NV, identity.top_k, dim=-1)
    tail_N = probs_NV.scatter(1, ids_NK, 0.0).sum(-1).clamp_min(SMALLEST)
    record_N = np.zeros(len(probs_NV), dtype=identity.record)
    record_N["ids"] = ids_NK.cpu().numpy()
    record_N["probs"] = probs_NK.clamp_min(SMALLEST).cpu().numpy()
    record_N["tail"] = tail_N.cpu().numpy()
    return record_N


def _write(path: Path, records_N: np.ndarray) -> None:
    """Writes beside its place, checksum first, then renames: an existing shard is complete."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(records_N.tobytes())
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


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
