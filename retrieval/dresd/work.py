"""The work folder of an unfinished DReSD store, beside the store's place; every file in it is whole or absent.

    plan.json            what is being built; a build with another plan does not resume it
    projection.npz       the fitted projection
    sequences.npz        all token ids with their context, which of them have keys, and where documents end
    states-00007.npy     a shard's target states, until the projection is fitted
    keys-00007.npy       a shard's keys
    all-keys.npy         all keys in the store's order, once every shard has its own
    trained.faiss        compressed cells without keys
    cells-00007.faiss    those with a range of all keys

Sequences are cut at `max_length`, each part starting with some of the text before it; documents are not cut, so a
continuation may cross a cut. Shards are drawn from all documents at random, so that the first ones are a fair sample
for fitting the projection.

Legend: T positions.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from draftsmith.infer.files.atomic import write_json
from draftsmith.infer.text.rendering import Rendered

SEQUENCES = "sequences.npz"
ALL_KEYS = "all-keys.npy"


@dataclass(frozen=True, slots=True)
class Sequences:
    """Parts of documents. Part i is `ids_T[starts[i] : starts[i + 1]]`; `keyed_T` marks tokens that have keys: those
    that the target emitted, and the one before them (the first step's query). `ends` counts keys up to the end of
    each document, which is a run of emitted tokens."""

    ids_T: np.ndarray
    keyed_T: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def ids(self, part: int) -> np.ndarray:
        return self.ids_T[self.starts[part] : self.starts[part + 1]]

    def keyed(self, part: int) -> np.ndarray:
        """Which positions of the part have keys."""
        return self.keyed_T[self.starts[part] : self.starts[part + 1]]

    def counts(self) -> np.ndarray:
        """Keys per part."""
        totals = np.concatenate([[0], np.cumsum(self.keyed_T, dtype=np.int64)])
        return totals[self.starts[1:]] - totals[self.starts[:-1]]

    def tokens(self) -> np.ndarray:
        """The keyed tokens of all parts in a row: the store's stream."""
        return self.ids_T[self.keyed_T]


def gather(samples: Iterable[Rendered], vocab_size: int, max_length: int) -> Sequences:
    """Cut samples into parts of at most `max_length` tokens. A sample's first token has no state, and so no key."""
    ids, keyed, starts, ends = array("I"), array("B"), array("Q", [0]), array("Q")
    keys = 0
    for number, sample in enumerate(samples, start=1):
        tokens, mask = sample.token_ids, sample.loss_mask
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
            raise ValueError(f"sample {number} holds a token id outside the target's vocabulary of {vocab_size}")
        after = [*mask[1:], 0]
        marked = [0, *(int(emitted or following) for emitted, following in zip(mask[1:], after[1:]))]
        for is_key, emitted, following in zip(marked, mask, after):
            keys += is_key
            if emitted and not following and keys > (ends[-1] if ends else 0):
                ends.append(keys)
        for first, context in _parts(len(tokens), max_length):
            last = min(first + max_length, len(tokens))
            own = [0] * context + marked[first + context : last]
            if any(own):
                ids.extend(tokens[first:last])
                keyed.extend(own)
                starts.append(len(ids))
    return Sequences(
        np.array(ids, dtype=np.uint32),
        np.array(keyed, dtype=np.uint8).astype(bool),
        np.array(starts, dtype=np.int64),
        np.array(ends, dtype=np.uint64),
    )


def _parts(length: int, max_length: int) -> Iterator[tuple[int, int]]:
    """(first token, number of leading tokens that are context only: an earlier part has their keys)."""
    context = max_length // 4
    first = 0
    yield 0, 0
    while first + max_length < length:
        first += max_length - context
        yield first, context


def shards(sequences: Sequences, size: int, seed: int) -> list[np.ndarray]:
    """Random groups of parts, of about `size` keys each; within a group, parts keep their order."""
    order = np.random.default_rng(seed).permutation(len(sequences))
    filled = np.cumsum(sequences.counts()[order])
    group = (filled - 1) // size if len(order) else filled
    return [np.sort(order[group == number]) for number in np.unique(group)]


class BuildFolder:
    """The folder of an unfinished store, locked by its builder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: str, number: int) -> Path:
        return self.folder / f"{kind}-{number:05d}.npy"

    def begin(self, plan: dict[str, Any]) -> None:
        """Start, or resume the same plan. Until the data is read, there is nothing to resume."""
        path = self.folder / "plan.json"
        plan = json.loads(json.dumps(plan))
        if path.exists() and (self.folder / SEQUENCES).exists():
            known = json.loads(path.read_text(encoding="utf-8"))
            other = next((key for key in plan if known.get(key) != plan[key]), None)
            if other is not None:
                raise ValueError(
                    f"{self.folder} is an interrupted build with another {other}: delete that folder to start over, or "
                    "repeat the command of that build to resume it"
                )
        else:
            write_json(path, plan)

    def sequences(self, make: Callable[[], Sequences]) -> Sequences:
        path = self.folder / SEQUENCES
        if not path.exists():
            made = make()
            with whole_file(path) as file:
                np.savez(file, ids=made.ids_T, keyed=made.keyed_T, starts=made.starts, ends=made.ends)
        with np.load(path) as found:
            return Sequences(found["ids"], found["keyed"], found["starts"], found["ends"])

    @property
    def projection(self) -> Path:
        return self.folder / "projection.npz"

    @property
    def trained(self) -> Path:
        return self.folder / "trained.faiss"

    def cells(self, number: int) -> Path:
        return self.folder / f"cells-{number:05d}.faiss"

    def save(self, kind: str, number: int, values: np.ndarray) -> None:
        with whole_file(self.path(kind, number)) as file:
            np.save(file, values)

    def load(self, kind: str, number: int) -> np.ndarray:
        return np.asarray(np.load(self.path(kind, number)))

    def has(self, kind: str, number: int) -> bool:
        return self.path(kind, number).exists()

    def drop(self, kind: str, number: int) -> None:
        self.path(kind, number).unlink(missing_ok=True)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that is renamed to `path` when it is complete."""
    beside = path.with_name(f".{path.name}.part")
    with beside.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
