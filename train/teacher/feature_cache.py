"""The target's states on disk: for each token of the corpus the named states and the last one, from which the target's
head still makes its distributions. shards.py describes the folder, whose facts are in features.json.

Only the target's head stays loaded (and its embedding, where heads read tokens). In bfloat16 the states, and so the
distributions, are rounded.

Legend: B rows, T positions, N positions, W width of all states of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from draftsmith.train.data.batches import Batch, assemble, rank
from draftsmith.train.data.packing import pack
from draftsmith.train.drafts.exits import TrainContext
from draftsmith.train.teacher.features import FeatureBatch, Features, LiveFeatures
from draftsmith.train.teacher.live import OutputHead
from draftsmith.train.teacher.shards import (
    CacheKind,
    Records,
    ShardReader,
    built,
    corpus_hash,
    samples_of,
    weights_hash,
)

FORMAT = 1
# A shard is built in memory.
SHARD_BYTES = 1 << 28
ROWS_AT_ONCE = 4
KIND = CacheKind("feature cache", "features.json", "features are `live` or the folder of a cache")
# dtype -> how numpy holds its bits; it has no bfloat16.
STORED = {"bfloat16": np.dtype(np.uint16), "float32": np.dtype(np.float32)}


@dataclass(frozen=True, slots=True)
class FeatureIdentity:
    """What a cache of features was built from. `states`: their names, in the order in which they are stored."""

    target: str
    corpus: str
    positions: int
    states: str
    width: int
    dtype: str
    format: int = FORMAT

    @property
    def names(self) -> list[str]:
        return self.states.split(",")

    @property
    def record(self) -> np.dtype[Any]:
        return np.dtype([("states", STORED[self.dtype], (self.width * len(self.names),))])

    @property
    def shard_positions(self) -> int:
        return max(SHARD_BYTES // self.record.itemsize, 1)


def open_features(where: str, run: TrainContext, names: Sequence[str], dtype: str = "bfloat16") -> Features:
    """`live`, or the cache in the folder `where`, which is built or completed first if needed."""
    if where == "live":
        return LiveFeatures(run.target, names)
    if dtype not in STORED:
        raise ValueError(f"--features_dtype {dtype}: {' or '.join(STORED)}")
    states = ",".join(dict.fromkeys([*names, "last"]))
    width = int(run.target.config.get_text_config().hidden_size)
    identity = FeatureIdentity(
        weights_hash(run.target), corpus_hash(run.corpus), len(run.corpus.tokens), states, width, dtype
    )
    shards = built(Path(where).expanduser(), identity, KIND, run, partial(_open_records, names), rank() == 0)
    return CachedFeatures(shards, identity, run.target)


def _open_records(names: Sequence[str], run: TrainContext, identity: FeatureIdentity) -> Records:
    return partial(_records, LiveFeatures(run.target, names), identity, run)


class CachedFeatures:
    """Reads the states of a batch's tokens; those of a row's unused end are zero."""

    def __init__(self, records: ShardReader, identity: FeatureIdentity, target: Any) -> None:
        self.output = OutputHead.of(target.requires_grad_(False))
        self.vocab_size = self.output.head.out_features
        self.names = identity.names
        self._dtype = getattr(torch, identity.dtype)
        self._records = records

    def __call__(self, batch: Batch) -> FeatureBatch:
        device, places_BT = batch["places"].device, batch["places"].cpu()
        if self.output.head.weight.device != device:
            self.output.head.to(device)
        there_BT = places_BT >= 0
        stored_NW = torch.from_numpy(self._records[places_BT[there_BT].numpy()]["states"]).view(self._dtype)
        states_BTW = torch.zeros((*places_BT.shape, stored_NW.shape[-1]), dtype=self._dtype)
        states_BTW[there_BT] = stored_NW
        parts = states_BTW.to(device).chunk(len(self.names), -1)
        return FeatureBatch(dict(zip(self.names, parts)), self.output)


def _records(live: LiveFeatures, identity: FeatureIdentity, run: TrainContext, positions: range) -> np.ndarray:
    """[N] records of `positions`, which are places of the corpus."""
    corpus = run.corpus
    samples = samples_of(np.asarray(corpus.offsets[:-1]), positions)
    records_N = np.zeros(len(positions), dtype=identity.record)
    packs = pack(corpus.lengths, run.max_length, np.arange(samples.start, samples.stop))
    for start in range(0, len(packs), ROWS_AT_ONCE):
        batch = assemble(corpus, packs[start : start + ROWS_AT_ONCE], run.max_length)
        at_BT = batch["places"] - positions.start
        inside_BT = (batch["places"] >= 0) & (at_BT >= 0) & (at_BT < len(positions))
        features = live({name: value.to(run.device) for name, value in batch.items()})
        states_BTW = torch.cat([features[name] for name in identity.names], -1)
        stored_NW = states_BTW[inside_BT.to(run.device)].to(getattr(torch, identity.dtype)).cpu()
        bits_NW = stored_NW.view(torch.uint16) if identity.dtype == "bfloat16" else stored_NW
        records_N["states"][at_BT[inside_BT].numpy()] = bits_NW.numpy()
    return records_N
