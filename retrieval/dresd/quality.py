"""How good a DReSD store is, measured without decoding.

*Self-recall*, a test of the index: does a stored key find itself (mean reciprocal rank)? *Index recall*: how many of
the exact nearest keys does an approximate index find? *Held-out recall*, a test of drafts: at positions of text that is
not stored, how often are the next n tokens right in the best continuation, or in any that would be drafted?

Legend: T positions, N keys, K key dimensions, C neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from draftsmith.infer.contract.protocols import Target
from draftsmith.infer.text.rendering import Rendered
from draftsmith.retrieval.dresd.embedding import embed
from draftsmith.retrieval.dresd.index import IndexKind, make_index, search, stored_keys
from draftsmith.retrieval.dresd.store import DresdStore

NEXT = (1, 2, 4)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Positions of text that is not stored: keys, tokens, and the tokens that followed."""

    keys_NK: np.ndarray
    tokens: list[int]
    followed: list[list[int]]

    def __len__(self) -> int:
        return len(self.tokens)


def hold_out(store: DresdStore, target: Target, samples: Sequence[Rendered], batch_positions: int = 8_192) -> HeldOut:
    """The positions of `samples` before an emitted token, as the drafter would query them."""
    samples = [sample for sample in samples if len(sample.token_ids) > 2]
    states = embed(target, [sample.token_ids for sample in samples], store.manifest["feature"], batch_positions)
    keys, tokens, followed = [], [], []
    for sample, states_TD in zip(samples, states):
        ids, mask = sample.token_ids, sample.loss_mask
        where = [i for i in range(1, len(ids) - 1) if mask[i + 1]]
        keys.append(store.project(states_TD[torch.tensor(where, dtype=torch.long, device=states_TD.device) - 1]))
        tokens += [ids[i] for i in where]
        for i in where:
            end = next((j for j in range(i + 1, len(ids)) if not mask[j]), len(ids))
            followed.append(ids[i + 1 : min(i + 1 + max(NEXT), end)])
    if not tokens:
        raise ValueError("the held-out text has no position before a token of an answer: give records with answers")
    return HeldOut(np.concatenate(keys), tokens, followed)


def self_recall(store: DresdStore, sample: int = 1_000, neighbours: int = 50, seed: int = 0) -> float:
    """The mean reciprocal rank of a stored key among its neighbours (0 if it is not among them). Equal keys share a
    rank."""
    chosen = _sample(len(store), sample, seed)
    sims_NC, offsets_NC = store.search(stored_keys(store.index, chosen), neighbours)
    total = 0.0
    for offset, sims_C, offsets_C in zip(chosen, sims_NC, offsets_NC):
        where = np.flatnonzero(offsets_C == offset)
        if len(where):
            total += 1 / (1 + int((sims_C > sims_C[where[0]]).sum()))
        elif sims_C[-1] >= 1 - 1e-6:
            total += 1.0  # the store has more copies of it than `neighbours`
    return total / len(chosen)


def held_out_recall(
    store: DresdStore, text: HeldOut, neighbours: int = 50, num_drafts: int = 10, seed: int = 0, sample: int = 4_000
) -> dict[str, Any]:
    """Of the positions before n tokens, the share where the best draft, and where any draft, has these n tokens."""
    chosen = _sample(len(text), sample, seed)
    total, best, some = dict.fromkeys(NEXT, 0), dict.fromkeys(NEXT, 0), dict.fromkeys(NEXT, 0)
    usable = 0
    _, offsets_NC = store.search(text.keys_NK[chosen], neighbours)
    for at, offsets_C in zip(chosen, offsets_NC):
        near = [int(offset) for offset in offsets_C if offset >= 0 and store.tokens[offset] == text.tokens[at]]
        drafts = [store.continuation(offset, max(NEXT)) for offset in near[:num_drafts]]
        usable += bool(drafts)
        for n in NEXT:
            wanted = text.followed[at][:n]
            if len(wanted) == n:
                total[n] += 1
                best[n] += bool(drafts) and drafts[0][:n] == wanted
                some[n] += any(draft[:n] == wanted for draft in drafts)
    return {
        "positions": len(chosen),
        "with_a_draft": usable / len(chosen),
        "best": {str(n): best[n] / total[n] for n in NEXT if total[n]},
        "any": {str(n): some[n] / total[n] for n in NEXT if total[n]},
    }


def index_recall(
    stored_NK: np.ndarray, queries_NK: np.ndarray, kind: IndexKind, count: int = 10, seed: int = 0
) -> dict[str, Any]:
    """recall@`count` of an index of `kind` against the exact one, and the time of single queries in each."""
    exact = make_index("flat", stored_NK)
    start = time.perf_counter()
    made = make_index(kind, stored_NK, seed)
    built = time.perf_counter() - start
    sims_NC, _ = search(exact, queries_NK, count)
    _, found_NC = search(made, queries_NK, count)
    right = 0
    for key_K, sims_C, offsets_C in zip(queries_NK, sims_NC, found_NC):
        # By similarity, not by offset: equal keys are interchangeable.
        right += int((stored_NK[offsets_C[offsets_C >= 0]] @ key_K >= sims_C[-1] - 1e-6).sum())
    return {
        "index": kind,
        "keys": len(stored_NK),
        f"recall@{count}": right / (count * len(queries_NK)),
        "build_s": round(built, 2),
        "query_ms": query_ms(made, queries_NK),
        "exact_query_ms": query_ms(exact, queries_NK),
    }


def query_ms(index: Any, queries_NK: np.ndarray, neighbours: int = 50, queries: int = 200) -> dict[str, float]:
    """Median and 99th percentile of single queries, one after another."""
    took = []
    for key_K in queries_NK[:queries]:
        start = time.perf_counter()
        index.search(key_K[None], min(neighbours, index.ntotal))
        took.append(1e3 * (time.perf_counter() - start))
    return {"p50": round(float(np.quantile(took, 0.5)), 3), "p99": round(float(np.quantile(took, 0.99)), 3)}


def _sample(count: int, sample: int, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).permutation(count)[:sample])
