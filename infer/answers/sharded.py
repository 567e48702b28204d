"""Answers by many workers: each shard of the records is answered into a file of its own, which the answers take over.

In one process there is one shard, whose file is that of the answers. A shard's file holds whole rows at any time, so
that a worker that dies loses only the rows it was decoding; its successor continues the file. An answer depends on its
record's key and the seed, not on the shard (contract/rng.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from draftsmith.infer.answers.answer_file import AnswerFile, KeyedRecord
from draftsmith.infer.files.workers import Note, Progress, Work, Workers

# Rows of a shard, in batches: the last answers of a shard leave its batch partly empty.
BATCHES_IN_SHARD = 32

# (records, file, note): answers the records that the file lacks.
Answer = Callable[[Sequence[KeyedRecord], AnswerFile, Note], None]


@dataclass(frozen=True, slots=True)
class AnswerShard:
    """`path`: its file, or None for the file of the answers itself."""

    records: Sequence[KeyedRecord]
    path: Path | None = None


def answer_shards(
    open_answer: Callable[[], Answer],
    records: Sequence[KeyedRecord],
    out: AnswerFile,
    workers: Workers,
    batch_size: int,
    progress: Progress | None = None,
) -> None:
    """Answer the records that `out` lacks, and leave its rows in the order of the records.

    `open_answer` is called in every worker. `progress(rows, tokens)`: of this run.
    """
    missing = out.missing(records)
    into = None
    shards = [AnswerShard(missing)] if missing else []
    if workers.in_process:
        into = out
    else:
        size = max(min(BATCHES_IN_SHARD * batch_size, -(-len(missing) // (2 * workers.count))), 1)
        shards = [
            AnswerShard(missing[start : start + size], out.shards / f"{start:08d}.jsonl")
            for start in range(0, len(missing), size)
        ]
        out.shards.mkdir(exist_ok=True)
    for number, _ in workers.map(_Opened(open_answer, into), enumerate(shards), progress, out.shards):
        shard = shards[number]
        if shard.path is not None:
            out.take_over(shard.path)
        if lost := out.missing(shard.records):
            raise ValueError(f"{shard.path} lacks {len(lost)} of its answers: run the same command again")
    shutil.rmtree(out.shards, ignore_errors=True)
    out.put_in_order(records)


@dataclass(frozen=True, slots=True)
class _Opened:
    """What a worker calls before its first shard. `into`: the open file of the answers, in one process."""

    open_answer: Callable[[], Answer]
    into: AnswerFile | None

    def __call__(self) -> Work:
        answer = self.open_answer()

        def work(shard: AnswerShard, note: Note) -> None:
            if self.into is not None:
                answer(shard.records, self.into, note)
                return
            assert shard.path is not None
            with AnswerFile(shard.path, None) as file:
                answer(shard.records, file, note)

        return work
