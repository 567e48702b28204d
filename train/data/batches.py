"""Packed batches in an order that depends only on the seed, for any number of ranks and workers.

Optimiser step s trains on packs s * batch_size ... of an endless stream, divided among its ranks and micro-batches. So
every micro-batch knows the loss tokens of its whole step without communication, and a resumed run continues at the step
where it stopped.

Legend: B rows, T positions.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from draftsmith.train.data.corpus import Corpus
from draftsmith.train.data.packing import PackStream

IGNORED = -100
Batch = dict[str, torch.Tensor]


def rank() -> int:
    """This process's rank from the launcher's environment variables, for use before a trainer exists."""
    for name in ("RANK", "SLURM_PROCID"):
        if name in os.environ:
            return int(os.environ[name])
    return int(os.environ.get("LOCAL_RANK", 0)) + int(os.environ.get("NODE_RANK", 0))


def assemble(corpus: Corpus, packs: list[list[int]], length: int, first: int = 0) -> Batch:
    """[B, T] token ids; position ids, which restart in each document; labels, the next token of the same document where
    it is learned, else IGNORED; places, the index of each token in the corpus, or -1. [B] rows: their numbers in the
    run, from `first`. The unused end of a row is a document of its own."""
    input_ids_BT = np.zeros((len(packs), length), dtype=np.int64)
    position_ids_BT = np.zeros((len(packs), length), dtype=np.int64)
    labels_BT = np.full((len(packs), length), IGNORED, dtype=np.int64)
    places_BT = np.full((len(packs), length), -1, dtype=np.int64)
    for b, samples in enumerate(packs):
        at = 0
        for sample in samples:
            tokens, mask = corpus.sample(sample)
            end = at + len(tokens)
            input_ids_BT[b, at:end] = tokens
            position_ids_BT[b, at:end] = np.arange(len(tokens))
            labels_BT[b, at : end - 1] = np.where(mask[1:], tokens[1:], IGNORED)
            places_BT[b, at:end] = int(corpus.offsets[sample]) + np.arange(len(tokens))
            at = end
        position_ids_BT[b, at:] = np.arange(length - at)
    arrays = {"input_ids": input_ids_BT, "position_ids": position_ids_BT, "labels": labels_BT, "places": places_BT}
    rows_B = torch.arange(first, first + len(packs))
    return {**{name: torch.from_numpy(array) for name, array in arrays.items()}, "rows": rows_B}


class MicroBatches(Dataset[Batch]):
    """The micro-batches of one rank, numbered through the whole run."""

    def __init__(self, corpus: Corpus, stream: PackStream, batch_size: int, micro: int, rank: int, ranks: int) -> None:
        assert batch_size % (micro * ranks) == 0
        self.corpus = corpus
        self.stream = stream
        self.batch_size = batch_size
        self.micro = micro
        self.rank = rank
        self.ranks = ranks
        self.per_step = batch_size // (micro * ranks)

    def __getitem__(self, number: int) -> Batch:
        step, part = divmod(number, self.per_step)
        first = step * self.batch_size + (part * self.ranks + self.rank) * self.micro
        rows = [self.stream.pack(first + i) for i in range(self.micro)]
        batch = assemble(self.corpus, rows, self.stream.capacity, first)
        packs = range(step * self.batch_size, (step + 1) * self.batch_size)
        batch["loss_tokens"] = torch.tensor(max(sum(map(self.stream.loss_tokens, packs)), 1))
        batch["number"] = torch.tensor(number)
        return batch


class BatchStream:
    """An endless loader from micro-batch `start`. It has no length, so Lightning counts only steps."""

    def __init__(self, batches: MicroBatches, start: int, workers: int) -> None:
        self.batches = batches
        self.start = start
        self.workers = workers

    def __iter__(self) -> Iterator[Batch]:
        # Without its own generator the loader would draw its workers' seed from torch's global one.
        generator = torch.Generator().manual_seed(self.start)
        return iter(
            DataLoader(
                self.batches,
                batch_size=None,
                sampler=itertools.count(self.start),
                num_workers=self.workers,
                pin_memory=torch.cuda.is_available(),
                generator=generator,
                worker_init_fn=_begin_worker,
            )
        )


def _begin_worker(worker: int) -> None:
    """A SIGTERM to the whole process group is the run's to answer, which ends its workers itself. If the run is killed,
    its workers end on their own. torch's own watch fails where a worker waits to hand over a batch, and where a fork
    server has started it, whose child it then is."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    run = multiprocessing.parent_process()
    assert run is not None

    def watch() -> None:
        run.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="run-watch").start()
