"""Builds a teacher cache: the frozen target reads the corpus once, and its distributions go to disk shard by shard.

Legend: N positions that have a label, K kept tokens, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

from draftsmith.train.data.batches import IGNORED, assemble, rank
from draftsmith.train.data.corpus import Corpus
from draftsmith.train.data.packing import pack
from draftsmith.train.drafts.exits import TrainContext
from draftsmith.train.teacher.cache import KIND, CachedTeacher, Identity, identity_of, learned_positions
from draftsmith.train.teacher.live import LiveTeacher
from draftsmith.train.teacher.shards import Records, built, samples_of

ROWS_AT_ONCE = 4
POSITIONS_AT_ONCE = 256
SMALLEST = 2.0**-24  # float16's smallest: a kept token never has probability 0


def open_or_build(folder: str, run: TrainContext, *, top_k: int, temperature: float) -> CachedTeacher:
    """The cache in `folder`, built or completed first if needed."""
    identity = identity_of(run.target, run.corpus, top_k, temperature)
    shards = built(Path(folder).expanduser(), identity, KIND, run, _open_records, rank() == 0)
    return CachedTeacher(shards, identity, run.corpus)


def _open_records(run: TrainContext, identity: Identity) -> Records:
    return partial(_records, LiveTeacher(run.target), identity, run, learned_positions(run.corpus))


def _records(
    teacher: LiveTeacher, identity: Identity, run: TrainContext, before: np.ndarray, positions: range
) -> np.ndarray:
    """[N] records of `positions`; `before`: the number of learned positions before each place of the corpus."""
    corpus: Corpus = run.corpus
    samples = samples_of(before[corpus.offsets[:-1]], positions)
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
