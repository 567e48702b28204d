"""An IVF-PQ index of more keys than one process could add, or hold: trained on a sample, filled range by range by all
workers, and merged by FAISS (`merge_from`, or `merge_ondisk`, which leaves the lists in a file that a search maps).

Each range of the store's keys is a task, and its cells a file in the build's folder (work.py). A list holds its keys in
the store's order, and a range is filled by one thread, so that the index has the same bytes on any number of workers.

Legend: N keys, K key dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from draftsmith.infer.files.workers import Note, Work, Workers
from draftsmith.retrieval.dresd.embedding import Progress
from draftsmith.retrieval.dresd.index import (
    BLOCK,
    Lists,
    lists_of,
    load_faiss,
    one_thread,
    quiet,
    train_cells,
    write_index,
)
from draftsmith.retrieval.dresd.work import ALL_KEYS, BuildFolder

# Each range's file repeats the trained index, so there are not more of them than this.
MOST_RANGES = 256
SMALLEST_RANGE = 1 << 18


@dataclass(frozen=True, slots=True)
class KeyRange:
    """The keys from `first` up to `last`."""

    number: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class CellFiller:
    """What a worker calls before its first range."""

    folder: Path

    def __call__(self) -> Work:
        faiss, work = load_faiss(), BuildFolder(self.folder)
        trained = faiss.read_index(str(work.trained))
        keys_NK = np.load(work.folder / ALL_KEYS, mmap_mode="r")

        def run(asked: KeyRange, note: Note) -> None:
            index = faiss.clone_index(trained)
            with one_thread():
                for start in range(asked.first, asked.last, BLOCK):
                    end = min(start + BLOCK, asked.last)
                    index.add_with_ids(np.ascontiguousarray(keys_NK[start:end]), np.arange(start, end))
                    note(end - asked.first, 0)
            write_index(index, work.cells(asked.number))

        return run


def build_cells(
    work: BuildFolder,
    keys_NK: np.ndarray,
    seed: int,
    workers: Workers,
    out: Path,
    lists: Lists = "memory",
    progress: Progress | None = None,
) -> None:
    """Write the index of all keys, `keys_NK` in the build's folder, to `out`; with its lists on disk they are in a
    file of their own beside it. `progress`: (keys added, by an earlier build too; keys in total)."""
    if not work.trained.exists():
        write_index(train_cells(keys_NK, seed), work.trained)
    ranges = key_ranges(len(keys_NK))
    left = [asked for asked in ranges if not work.cells(asked.number).exists()]
    before = len(keys_NK) - sum(asked.last - asked.first for asked in left)

    def note(keys: int, _: int) -> None:
        if progress is not None:
            progress(before + keys, len(keys_NK))

    filler = CellFiller(work.folder.absolute())
    for _ in workers.map(filler, ((asked.number, asked) for asked in left), note, work.folder):
        pass
    write_index(_merged(work, ranges, out, lists), out)


def key_ranges(count: int) -> list[KeyRange]:
    """Depends on nothing but the number of keys."""
    size = max(SMALLEST_RANGE, -(-count // MOST_RANGES))
    return [KeyRange(number, first, min(first + size, count)) for number, first in enumerate(range(0, count, size))]


def _merged(work: BuildFolder, ranges: list[KeyRange], out: Path, lists: Lists) -> Any:
    """The trained index with the keys of all ranges, in their order."""
    faiss = load_faiss()
    index, parts = faiss.read_index(str(work.trained)), [str(work.cells(asked.number)) for asked in ranges]
    if lists == "memory":
        for part in parts:
            index.merge_from(faiss.read_index(part), 0)
        return index
    from faiss.contrib.ondisk import merge_ondisk

    with quiet():
        merge_ondisk(index, parts, str(lists_of(out)))
    # Read from the index's own folder, so that the index's bytes don't depend on where it was built.
    faiss.downcast_InvertedLists(index.invlists).filename = lists_of(out).name
    return index
