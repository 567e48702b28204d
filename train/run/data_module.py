"""The LightningDataModule: a corpus, split into an endless training stream and held-out batches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import lightning
import numpy as np

from draftsmith.infer.files.locations import cache_folder
from draftsmith.infer.text.templates import Template
from draftsmith.train.data.batches import Batch, BatchStream, MicroBatches, assemble
from draftsmith.train.data.corpus import Corpus, load_corpus, split
from draftsmith.train.data.packing import PackStream
from draftsmith.train.run.config import RunConfig


class Batches(lightning.LightningDataModule):
    """The training stream, and held-out batches in a fixed order."""

    def __init__(
        self,
        corpus: Corpus,
        train: np.ndarray,
        held_out: np.ndarray,
        *,
        max_length: int,
        batch_size: int,
        micro_batch_size: int,
        seed: int = 0,
        workers: int = 0,
        val_packs: int = 16,
    ) -> None:
        super().__init__()
        self.corpus = corpus
        self.held_out = held_out
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.workers = workers
        self.val_packs = val_packs
        lengths, counts = corpus.lengths, corpus.loss_counts
        self.stream = PackStream(lengths, counts, train, max_length, seed, shuffle=True)
        self.val_stream = PackStream(lengths, counts, held_out, max_length, seed, shuffle=False)

    def steps_in(self, epochs: float) -> int:
        """Optimiser steps of `epochs`, at least one; the last step may reach into the next epoch."""
        return max(-(-self.rows_in(epochs) // self.batch_size), 1)

    def rows_in(self, epochs: float) -> int:
        return self.stream.packs_in(epochs)

    def train_dataloader(self) -> BatchStream:
        trainer = self.trainer
        assert trainer is not None
        batches = MicroBatches(
            self.corpus, self.stream, self.batch_size, self.micro_batch_size, trainer.global_rank, trainer.world_size
        )
        return BatchStream(batches, trainer.global_step * batches.per_step, self.workers)

    def val_dataloader(self) -> list[Batch]:
        """Empty: validation.py measures held-out rows between steps, not Lightning's own loop."""
        return []

    def val_batches(self, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """This rank's share of the held-out batches, one row each; every rank gets the same number."""
        if not len(self.held_out):
            return
        count = min(self.val_stream.packs_in(1), self.val_packs)
        for first in range(0, count, ranks):
            pack = self.val_stream.pack(first + rank) if first + rank < count else []
            yield assemble(self.corpus, [pack], self.val_stream.capacity)


def load_run_corpus(config: RunConfig, template: Template) -> Corpus:
    """The corpus of a run, tokenised first if it is not in the cache."""
    cache = Path(config.text.cache or cache_folder() / "tokens").expanduser()
    return load_corpus(config.data, template, max_length=config.text.max_length, cache=cache, limit=config.text.limit)


def load_data(config: RunConfig, template: Template, first: bool) -> tuple[Corpus, Batches]:
    """The data of a resolved config; `first`: print its summary."""
    corpus = load_run_corpus(config, template)
    train, held_out = split(corpus, config.text.held_out, config.text.split_by)
    data = Batches(
        corpus,
        train,
        held_out,
        max_length=config.text.max_length,
        batch_size=config.optim.batch_size,
        micro_batch_size=config.optim.micro_batch_size,
        seed=config.seed,
        workers=config.machine.workers,
        val_packs=config.watch.val_packs,
    )
    if first:
        for line in corpus.report["lines"]:
            print(line, file=sys.stderr)
        print(f"{len(train)} sequences to train on, {len(held_out)} held out; rows filled to "
              f"{data.stream.filled():.1%}", file=sys.stderr)  # fmt: skip
    return corpus, data
