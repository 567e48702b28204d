"""An unfinished DReSD store: a folder beside its place, in which every file is whole or not there.

    plan.json            what is being built; a build with another plan does not go on from here
    sequences.npz        all token ids with their context, which of them have keys, and where documents end
    states-00007.npy     a shard's target states, until the projection is fitted
    keys-00007.npy       a shard's keys

Sequences are cut where the target's context ends, each part with some of the text before it; documents are not: a
continuation may go on over the cut. Shards are drawn from all documents at random, so that the first ones are a fair
sample to fit the projection on. Models and indexes are not known here.

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
from draftsmith.retrieval.store.format import locked

SEQUENCES = "sequences.npz"


@dataclass(frozen=True, slots=True)
class Sequences:
    """Parts of documents. Part i holds `ids_T[starts[i] : starts[i + 1]]`; tokens that are marked as `keyed` have keys,
    in this order: what the target emitted, and the one token before, from which it began (the first step's query).
    `ends` counts keys up to the end of each document, which is a run of emitted tokens."""

    ids_T: np.ndarray
    keyed_T: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def ids(self, part: int) -> list[int]:
        return [int(token) for token in self.ids_T[self.starts[part] : self.starts[part + 1]]]

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
    """Samples to parts of at most `max_length` tokens. A token that nothing stands before has no state, and no key."""
    ids, keyed, starts, ends = array("I"), array("B"), array("Q", [0]), array("Q")
    keys = 0
    for number, sample in enumerate(samples, start=1):
        tokens, mask = sample.token_ids, sample.loss_mask
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
            raise ValueError(f"sample {number} holds a token id outside the target's vocabulary of {vocab_size}")
        after = [*mask[1:], 0]
        marked = [0, *(int(one or behind) for one, behind in zip(mask[1:], after[1:]))]
        for one, emitted, behind in zip(marked, mask, after):
            keys += one
            if emitted and not behind and keys > (ends[-1] if ends else 0):
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
    """(first token, how many of the part's tokens are context only: an earlier part has their keys)."""
    context = max_length // 4
    first = 0
    yield 0, 0
    while first + max_length < length:
        first += max_length - context
        yield first, context


def shards(sequences: Sequences, size: int, seed: int) -> list[np.ndarray]:
    """Parts in random order, in groups of about `size` keys; within a group in their own order."""
    order = np.random.default_rng(seed).permutation(len(sequences))
    filled = np.cumsum(sequences.counts()[order])
    group = (filled - 1) // size if len(order) else filled
    return [np.sort(order[group == number]) for number in np.unique(group)]


class BuildFolder:
    """The folder of an unfinished store, held by one process at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: str, number: int) -> Path:
        return self.folder / f"{kind}-{number:05d}.npy"

    def begin(self, plan: dict[str, Any]) -> None:
        """Start, or go on with the same plan. Before the data were read nothing is there to go on with."""
        path = self.folder / "plan.json"
        plan = json.loads(json.dumps(plan))
        if path.exists() and (self.folder / SEQUENCES).exists():
            known = json.loads(path.read_text(encoding="utf-8"))
            other = next((key for key in plan if known.get(key) != plan[key]), None)
            if other is not None:
                raise ValueError(
                    f"{self.folder} is a build that was interrupted and had another {other}: "
                    "delete that folder to begin anew, or ask for what was asked then"
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
    """A binary file that takes its name only when it is complete."""
    beside = path.with_name(f".{path.name}.part")
    with beside.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


@contextmanager
def held(folder: Path) -> Iterator[BuildFolder]:
    """The work folder, made if need be, under its lock."""
    with locked(folder):
        yield BuildFolder(folder)
