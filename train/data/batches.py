"""Packed batches in an order that depends on nothing but the seed, for any number of ranks and workers.

Optimiser step s trains on packs s * batch_size ... of the endless stream; its ranks and micro-batches share them out.
So every micro-batch knows how many loss tokens its whole step has, on all ranks, and no rank has to ask. A run that
resumes asks for the step it stopped at.

Legend: B rows, T positions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from draftsmith.train.data.corpus import Corpus
from draftsmith.train.data.packing import PackStream

IGNORED = -100
Batch = dict[str, torch.Tensor]


def rank() -> int:
    """This process's rank, before any trainer is there: launchers tell it in the environment."""
    for name in ("RANK", "SLURM_PROCID"):
        if name in os.environ:
            return int(os.environ[name])
    return int(os.environ.get("LOCAL_RANK", 0)) + int(os.environ.get("NODE_RANK", 0))


def assemble(corpus: Corpus, packs: list[list[int]], length: int) -> Batch:
    """[B, T] token ids, position ids that begin anew with each document, labels: at each position the next token of the
    same document where it is learned, IGNORED elsewhere; and places: where the corpus keeps each token, -1 for what is
    not the corpus's. The unused end of a row is a document of its own."""
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
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class MicroBatches(Dataset[Batch]):
    """The micro-batches of one rank, numbered over the whole run."""

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
        batch = assemble(self.corpus, [self.stream.pack(first + i) for i in range(self.micro)], self.stream.capacity)
        packs = range(step * self.batch_size, (step + 1) * self.batch_size)
        batch["loss_tokens"] = torch.tensor(max(sum(map(self.stream.loss_tokens, packs)), 1))
        batch["number"] = torch.tensor(number)
        return batch


class _From:
    """Numbers from `start` on, without end."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        number = self.start
        while True:
            yield number
            number += 1


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
        self.train_samples = train
        self.held_out = held_out
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.workers = workers
        self.val_packs = val_packs
        lengths, counts = corpus.lengths, corpus.loss_counts
        self.stream = PackStream(lengths, counts, train, max_length, seed, shuffle=True)
        self.val_stream = PackStream(lengths, counts, held_out, max_length, seed, shuffle=False)

    def steps_in(self, epochs: float) -> int:
        """Optimiser steps of so many epochs, at least one; the last step may reach into the next epoch."""
        return max(-(-self.stream.packs_in(epochs) // self.batch_size), 1)

    def train_dataloader(self) -> BatchStream:
        trainer = self.trainer
        assert trainer is not None
        batches = MicroBatches(
            self.corpus, self.stream, self.batch_size, self.micro_batch_size, trainer.global_rank, trainer.world_size
        )
        return BatchStream(batches, trainer.global_step * batches.per_step, self.workers)

    def val_dataloader(self) -> list[Batch]:
        """Nothing: held-out rows are measured between steps (validation.py), not by Lightning's own loop."""
        return []

    def val_batches(self, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """This rank's share of the held-out batches, one row each; every rank gets as many."""
        if not len(self.held_out):
            return
        count = min(self.val_stream.packs_in(1), self.val_packs)
        for first in range(0, count, ranks):
            pack = self.val_stream.pack(first + rank) if first + rank < count else []
            yield assemble(self.corpus, [pack], self.val_stream.capacity)


class BatchStream:
    """A loader without an end, from micro-batch `start` on. It has no length, so that Lightning counts steps only."""

    def __init__(self, batches: MicroBatches, start: int, workers: int) -> None:
        self.batches = batches
        self.start = start
        self.workers = workers

    def __iter__(self) -> Iterator[Batch]:
        # A generator of its own: an unseeded loader would draw its workers' seed from torch's global one.
        generator = torch.Generator().manual_seed(self.start)
        return iter(
            DataLoader(
                self.batches,
                batch_size=None,
                sampler=_From(self.start),
                num_workers=self.workers,
                pin_memory=torch.cuda.is_available(),
                generator=generator,
            )
        )
