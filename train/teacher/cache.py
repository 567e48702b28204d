"""A teacher on disk: per learned position the target's likeliest tokens, their probabilities and the remaining mass.

shards.py describes the folder, whose facts are in teacher.json. A record holds ids, probabilities (float16) and tail.

The remaining mass is spread in proportion to the draft's own probabilities. The divergences are then exactly those of
distributions in which all other tokens are one, in value and gradient; a flat rest would train the draft to be flat.

Legend: N positions that have a label, K kept tokens, V vocabulary, C positions of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from draftsmith.train.data.batches import IGNORED, Batch
from draftsmith.train.data.corpus import Corpus
from draftsmith.train.teacher.shards import CacheKind, ShardReader, corpus_hash, weights_hash

KIND = CacheKind("teacher cache", "teacher.json", "a teacher is `live` or the folder of a cache")
FORMAT = 1
SHARD_POSITIONS = 1 << 16


@dataclass(frozen=True, slots=True)
class Identity:
    """What a cache was built from; a cache is used only where all of it matches."""

    target: str
    corpus: str
    positions: int
    vocab_size: int
    top_k: int
    temperature: float
    format: int = FORMAT

    @property
    def record(self) -> np.dtype[Any]:
        """One position on disk."""
        ids = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        return np.dtype([("ids", ids, (self.top_k,)), ("probs", np.float16, (self.top_k,)), ("tail", np.float32)])

    @property
    def shard_positions(self) -> int:
        return SHARD_POSITIONS


def identity_of(model: Any, corpus: Corpus, top_k: int, temperature: float) -> Identity:
    """Hashes all weights of the target and all tokens of the corpus."""
    vocab_size = int(model.get_output_embeddings().out_features)
    if not 1 <= top_k < vocab_size:
        raise ValueError(f"a teacher cache of {top_k} tokens per position: 1 to {vocab_size - 1} of this vocabulary")
    positions = int(np.sum(corpus.loss_counts))
    return Identity(weights_hash(model), corpus_hash(corpus), positions, vocab_size, top_k, float(temperature))


def learned_positions(corpus: Corpus) -> np.ndarray:
    """[tokens] the number of learned positions before each place of the corpus. A position is the token before the one
    that is predicted, in the same sample."""
    learned = np.zeros(len(corpus.tokens), dtype=bool)
    learned[:-1] = np.asarray(corpus.masks[1:]) != 0
    learned[np.asarray(corpus.offsets[1:]) - 1] = False
    before = np.cumsum(learned, dtype=np.int64)
    before -= learned
    return before


class CachedTeacher:
    """Reads the distributions at a batch's positions from a finished cache."""

    def __init__(self, records: ShardReader, identity: Identity, corpus: Corpus) -> None:
        self.vocab_size = identity.vocab_size
        self._temperature = identity.temperature
        self._places = learned_positions(corpus)
        self._records = records

    def __call__(self, batch: Batch) -> CachedBatch:
        places_N = batch["places"][batch["labels"] != IGNORED]
        records_N = self._records[self._places[places_N.cpu().numpy()]]
        return CachedBatch(records_N, places_N.device, self._temperature)


class CachedBatch:
    """The distributions at a batch's positions, as read from disk."""

    def __init__(self, records_N: np.ndarray, device: torch.device, temperature: float) -> None:
        self.ids_NK = torch.from_numpy(records_N["ids"].astype(np.int64)).to(device)
        probs_NK = torch.from_numpy(records_N["probs"].astype(np.float32)).to(device)
        tail_N1 = torch.from_numpy(records_N["tail"].copy()).to(device)[:, None]
        whole_N1 = probs_NK.sum(-1, keepdim=True) + tail_N1  # float16 rounds
        self.log_probs_NK, self.log_tail_N1 = (probs_NK / whole_N1).log(), (tail_N1 / whole_N1).log()
        self.temperature = temperature

    def chunk(self, chunk: slice) -> CachedChunk:
        return CachedChunk(self.ids_NK[chunk], self.log_probs_NK[chunk], self.log_tail_N1[chunk], self.temperature)


@dataclass(frozen=True, slots=True)
class CachedChunk:
    ids_CK: torch.Tensor
    log_probs_CK: torch.Tensor
    log_tail_C1: torch.Tensor
    temperature: float

    def log_probs(self, temperature: float, draft_log_CV: torch.Tensor) -> torch.Tensor:
        assert temperature == self.temperature
        rest_CV = draft_log_CV.exp().scatter_(1, self.ids_CK, 0.0)
        log_rest_C1 = rest_CV.sum(-1, keepdim=True).clamp_min(torch.finfo(rest_CV.dtype).tiny).log()
        distribution_CV = draft_log_CV + (self.log_tail_C1.to(draft_log_CV.dtype) - log_rest_C1)
        return distribution_CV.scatter_(1, self.ids_CK, self.log_probs_CK.to(draft_log_CV.dtype))

    def probs(self, log_CV: torch.Tensor) -> torch.Tensor:
        return log_CV.exp()

    def choice(self) -> torch.Tensor:
        return self.ids_CK[:, 0]
