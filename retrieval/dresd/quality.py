"""How good a DReSD store is, told without decoding: three measures of three different things.

*Self-recall* asks whether a stored key finds itself (mean reciprocal rank): a test of the index, not of drafts. *Index
recall* compares an approximate index's nearest with the exact ones, on keys that are not stored. *Held-out recall* is
about drafts: at the positions of text that is not stored, how often the best continuation (or any of those that would
be drafted) goes on as the text does, for the next n tokens.

How text becomes samples is not known here.

Legend: N keys, K key dimensions, C neighbours.
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
from draftsmith.retrieval.dresd.embed import embed
from draftsmith.retrieval.dresd.index import IndexKind, make_index, stored_keys
from draftsmith.retrieval.dresd.store import DresdStore, search

NEXT = (1, 2, 4)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Positions of text that is not stored: their keys, their tokens, and what followed."""

    keys_NK: np.ndarray
    tokens: list[int]
    followed: list[list[int]]

    def __len__(self) -> int:
        return len(self.tokens)


def hold_out(store: DresdStore, target: Target, samples: Sequence[Rendered], batch_positions: int = 8_192) -> HeldOut:
    """The emitted positions of `samples` that have a token after them, as the drafter would meet them."""
    given = [sample.token_ids for sample in samples if len(sample.token_ids) > 2]
    masks = [sample.loss_mask for sample in samples if len(sample.token_ids) > 2]
    keys, tokens, followed = [], [], []
    for ids, mask, states_TD in zip(given, masks, embed(target, given, store.manifest["feature"], batch_positions)):
        where = [i for i in range(1, len(ids) - 1) if mask[i + 1]]
        keys.append(store.project(states_TD[torch.tensor(where, dtype=torch.long, device=states_TD.device) - 1]))
        tokens += [ids[i] for i in where]
        for i in where:
            end = next((j for j in range(i + 1, len(ids)) if not mask[j]), len(ids))
            followed.append(ids[i + 1 : min(i + 1 + max(NEXT), end)])
    if not tokens:
        raise ValueError("the held-out text has no position that a token of an answer follows")
    return HeldOut(np.concatenate(keys), tokens, followed)


def self_recall(store: DresdStore, sample: int = 1_000, neighbours: int = 50, seed: int = 0) -> float:
    """The mean reciprocal rank of a stored key among its own neighbours (0 where it is not among them). Keys that
    stand in the store twice share a rank."""
    chosen = _some(len(store), sample, seed)
    sims_NC, offsets_NC = store.search(stored_keys(store.index, chosen), neighbours)
    total = 0.0
    for offset, sims_C, offsets_C in zip(chosen, sims_NC, offsets_NC):
        where = np.flatnonzero(offsets_C == offset)
        if len(where):
            total += 1 / (1 + int((sims_C > sims_C[where[0]]).sum()))
        elif sims_C[-1] >= 1 - 1e-6:
            total += 1.0  # more copies of it than neighbours asked for
    return total / len(chosen)


def held_out_recall(
    store: DresdStore, text: HeldOut, neighbours: int = 50, num_drafts: int = 10, seed: int = 0, sample: int = 4_000
) -> dict[str, Any]:
    """Of the positions that n tokens follow, the share where the best draft, and where any draft, has those n."""
    chosen = _some(len(text), sample, seed)
    asked, best, some = dict.fromkeys(NEXT, 0), dict.fromkeys(NEXT, 0), dict.fromkeys(NEXT, 0)
    usable = 0
    _, offsets_NC = store.search(text.keys_NK[chosen], neighbours)
    for at, offsets_C in zip(chosen, offsets_NC):
        near = [int(offset) for offset in offsets_C if offset >= 0 and store.tokens[offset] == text.tokens[at]]
        drafts = [store.continuation(offset, max(NEXT)) for offset in near[:num_drafts]]
        usable += bool(drafts)
        for n in NEXT:
            wanted = text.followed[at][:n]
            if len(wanted) == n:
                asked[n] += 1
                best[n] += bool(drafts) and drafts[0][:n] == wanted
                some[n] += any(draft[:n] == wanted for draft in drafts)
    return {
        "positions": len(chosen),
        "with_a_draft": usable / len(chosen),
        "best": {str(n): best[n] / asked[n] for n in NEXT if asked[n]},
        "any": {str(n): some[n] / asked[n] for n in NEXT if asked[n]},
    }


def index_recall(
    stored_NK: np.ndarray, asked_NK: np.ndarray, kind: IndexKind, count: int = 10, seed: int = 0
) -> dict[str, Any]:
    """recall@`count` of an index of `kind` against the exact one, with the time of one query alone in each."""
    exact, made = make_index("flat", stored_NK), None
    start = time.perf_counter()
    made = make_index(kind, stored_NK, seed)
    built = time.perf_counter() - start
    sims_NC, _ = search(exact, asked_NK, count)
    _, found_NC = search(made, asked_NK, count)
    right = 0
    for key_K, sims_C, offsets_C in zip(asked_NK, sims_NC, found_NC):
        # By similarity, not by offset: of equal keys any will do.
        known = offsets_C[offsets_C >= 0]
        right += int((stored_NK[known] @ key_K >= sims_C[-1] - 1e-6).sum())
    return {
        "index": kind,
        "keys": len(stored_NK),
        f"recall@{count}": right / (count * len(asked_NK)),
        "build_s": round(built, 2),
        "query_ms": query_ms(made, asked_NK),
        "exact_query_ms": query_ms(exact, asked_NK),
    }


def query_ms(index: Any, asked_NK: np.ndarray, neighbours: int = 50, queries: int = 200) -> dict[str, float]:
    """Median and 99th percentile of single queries, one after another."""
    took = []
    for key_K in asked_NK[:queries]:
        start = time.perf_counter()
        index.search(key_K[None], min(neighbours, index.ntotal))
        took.append(1e3 * (time.perf_counter() - start))
    return {"p50": round(float(np.quantile(took, 0.5)), 3), "p99": round(float(np.quantile(took, 0.99)), 3)}


def _some(count: int, sample: int, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).permutation(count)[:sample])
