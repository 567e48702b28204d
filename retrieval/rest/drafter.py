"""REST: the draft is what followed the newest tokens wherever they stand in a store (arXiv 2311.08252), or in the row.

Every length of match counts at once: the places of all back-off levels, and the row's own earlier text, are merged into
one trie whose probabilities blend the levels, and the best nodes of it are the draft. Nothing found, nothing drafted.
The work is done by compiled kernels over mapped files (rest_lookup.py, rest_tree.py); how a store is written is
known to store_writer.py, and no model is known here.

Legend: G segments, H hits, D places ahead.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from draftsmith.infer.contract.draft import OUTRIGHT, Draft, Trial
from draftsmith.infer.contract.protocols import Budget, Feedback, PassTimer, Target, Verdict
from draftsmith.infer.contract.row import Row
from draftsmith.infer.costs.calibration import given_costs
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.drafters.tree_builder import affordable
from draftsmith.retrieval.rest.in_memory_index import InMemoryIndex
from draftsmith.retrieval.rest.row import RowIndex
from draftsmith.retrieval.rest.scratch import Scratch
from draftsmith.retrieval.rest.verbatim import contains
from draftsmith.retrieval.store.segments import Manifest, Store

KIND = "rest"
# How much of its counts each level gives up, by the number of tokens that match (the last entry: that many and more).
# Chosen, like every default below, on recorded chat answers to other questions than any reported figure.
DISCOUNTS = np.array([0.5, 0.6, 0.7, 0.8])
STRENGTHS = np.array([16.0, 8.0, 4.0, 2.0, 1.0, 0.5])
# The blended probability, and the share of such tokens that was accepted.
BLENDED = np.array([0.0, 0.021, 0.144, 0.245, 0.355, 0.449, 0.552, 0.645, 0.724, 0.852, 0.963, 1.0])
ACCEPTED = np.array([0.0, 0.03, 0.123, 0.17, 0.219, 0.298, 0.355, 0.475, 0.57, 0.67, 0.899, 1.0])


class Rest:
    """Drafts from a store of documents and from the row's own text.

    Args:
        store: the store's folder (`draftsmith store build rest`).
        nodes: the most nodes of a draft.
        num_draft_tokens: how far a place is read ahead.
        max_match: the longest match looked for, in tokens.
        hits: how many places of the store are read at most; longer matches come first.
        hits_per_level: how many of one match length; more than these are sampled.
        context_hits: how many places of the row's own text are read.
        context_weight: what one of them counts for, in places of the store; 0 leaves the row's own text out.
        context_lead: by how many tokens it is taken for a longer match than it is.
        min_confidence: nodes that are less probable than this, their ancestors counted in, are not drafted.
        threads: how many rows of a batch are looked up at the same time.
        verify: read the store's checksums when it is bound, instead of the files' sizes alone.
        max_mapped_mb: a larger store is not mapped into memory but read through a cache. A mapped one counts as this
            process's memory as it is touched, in the end as a whole.
        cache_mb: memory of that cache; all threads share it.
        max_arrived: of the documents that are taken in while drafting, the newest so many tokens are kept, in memory.
        costs: what passes of the target cost: a file, auto (what `draftsmith calibrate` left for this store and target,
            if it did) or none. Known, they cut each tree to the nodes that are worth verifying.
    """

    name = KIND
    features: tuple[str, ...] = ()
    forward_seconds = 0.0
    bytes_moved = 0

    def __init__(
        self,
        store: str,
        nodes: int = 64,
        num_draft_tokens: int = 12,
        max_match: int = 16,
        hits: int = 1024,
        hits_per_level: int = 512,
        context_hits: int = 128,
        context_weight: float = 2.0,
        context_lead: int = 1,
        min_confidence: float = 0.0,
        threads: int = 1,
        verify: bool = True,
        max_mapped_mb: float = 256,
        cache_mb: float = 64,
        max_arrived: int = 8_000_000,
        costs: Any = "auto",
    ) -> None:
        for what, value in (
            ("nodes", nodes), ("num_draft_tokens", num_draft_tokens), ("max_match", max_match), ("hits", hits),
            ("hits_per_level", hits_per_level), ("threads", threads)
        ):  # fmt: skip
            if value < 1:
                raise ValueError(f"{what} must be at least 1, not {value}")
        if min(context_weight, context_lead, context_hits, min_confidence, max_mapped_mb) < 0:
            raise ValueError(
                "context_weight, context_lead, context_hits, min_confidence and max_mapped_mb must not be negative"
            )
        self.path = Path(store).expanduser()
        self.origin = str(self.path)
        self.num_nodes = nodes
        self.num_draft_tokens = num_draft_tokens
        self.max_match = max_match
        self.hits = hits
        self.hits_per_level = hits_per_level
        self.context_hits = context_hits if context_weight else 0
        self.context_weight = context_weight
        self.context_lead = context_lead
        self.min_confidence = min_confidence
        self.threads = threads
        self.verify = verify
        self.max_mapped_mb = max_mapped_mb
        self.cache_mb = cache_mb
        self.max_arrived = max_arrived
        self.costs = costs
        self._economy: Policy | None = None
        self._verified = 0
        self._indexes: dict[Row, RowIndex] = {}
        self._pool: ThreadPoolExecutor | None = None

    def pass_timers(self) -> dict[str, PassTimer]:
        return {}

    def bind(self, target: Target) -> None:
        """Open the store, see that it speaks the target's language, and compile (from the cache, if it is not new)."""
        mapped = Manifest.read(self.path, KIND).bytes <= self.max_mapped_mb * 2**20 or not hasattr(os, "pread")
        filed = () if mapped else ("tokens", "suffixes")
        self._lookup, self._tree = kernels()
        store = Store.open(self.path, KIND, "checksums" if self.verify else "sizes", filed)
        if target.tokenizer is not None:
            store.check_tokenizer(target.tokenizer)
        if store.manifest.vocab_size > target.vocab_size:
            raise ValueError(
                f"the store {self.path} was built for {store.manifest.vocab_size} token ids; the target has "
                f"{target.vocab_size}"
            )
        self._store = store
        costs = given_costs(self.costs, self.origin, target)
        self._economy = Policy(costs, None) if costs is not None else None
        self._stored = [(segment.tokens, segment.arrays["suffixes"]) for segment in store.segments]
        self._known, self._vocab = store.manifest.vocab_size, target.vocab_size
        self._overlay = InMemoryIndex(self._known, np.dtype(store.manifest.dtype), self.max_arrived)
        sizes = (len(self._stored), self.max_match, self.hits + self.context_hits, self.num_draft_tokens)
        self._scratches = [Scratch(*sizes, self.num_nodes, self._vocab) for _ in range(self.threads)]
        for scratch in self._scratches:
            scratch.stored = self._streams(store) if filed else self._stored
        if self._pool is not None:
            self._pool.shutdown()
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None
        first = [int(token) for token in self._stored[0][0][:2]]
        self._draft(RowIndex(), first * 2, Budget(1, 1), self._scratches[0])

    def open(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        for row in rows:
            self._indexes[row] = RowIndex()

    def close(self, rows: Sequence[Row]) -> None:
        for row in rows:
            del self._indexes[row]

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        if self._economy is not None:
            self._economy.settle(self._verified, sum(len(verdict.committed) for verdict in verdicts))

    def add_document(self, ids: Sequence[int]) -> None:
        """Draft from one more document, which is kept in memory; the store itself does not change."""
        self._overlay.add(ids)
        for scratch in self._scratches:
            scratch.cover(len(self._stored) + len(self._overlay.runs))

    def holds(self, ids: Sequence[int]) -> bool:
        """Whether a document that is drafted from has all of `ids` in a row."""
        ids_T = np.asarray(ids, np.int64)
        segments = [*self._stored, *self._arrived()]
        return any(contains(*segment, self._known, ids_T, self._lookup.narrow) for segment in segments)

    def _streams(self, store: Store) -> list[tuple[Any, Any]]:
        """Each segment's tokens and suffixes, read from their files through one cache."""
        from draftsmith.retrieval.rest.stream_access import PageCache

        files = [segment.files[part] for segment in store.segments for part in ("tokens", "suffixes")]
        arrays = PageCache(self.cache_mb / self.threads).over(files)
        return list(zip(arrays[::2], arrays[1::2]))

    def _arrived(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(run.tokens, run.suffixes) for run in self._overlay.runs]

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget]) -> list[Draft]:
        work = [(self._indexes[row], row.ids, budget) for row, budget in zip(rows, budgets)]
        drafts = self._drafts(work)
        if self._economy is not None:
            self._economy.begin([len(row.ids) for row in rows])
            drafts = affordable(drafts, self._economy)
            self._verified = max(len(draft) for draft in drafts)
        return drafts

    def _drafts(self, work: list[tuple[RowIndex, list[int], Budget]]) -> list[Draft]:
        if self._pool is None or len(work) < 2:
            return [self._draft(*item, self._scratches[0]) for item in work]

        def share(worker: int) -> list[Draft]:
            return [self._draft(*item, self._scratches[worker]) for item in work[worker :: self.threads]]

        drafts: list[Draft] = [Draft()] * len(work)
        for worker, done in enumerate(self._pool.map(share, range(self.threads))):
            drafts[worker :: self.threads] = done
        return drafts

    def _draft(self, index: RowIndex, ids: list[int], budget: Budget, scratch: Scratch) -> Draft:
        index.catch_up(ids, self._lookup)
        nodes, depth = min(budget.nodes, self.num_nodes), min(budget.depth, self.num_draft_tokens)
        if nodes < 1 or depth < 1:
            return Draft()
        count = self._find(index, scratch)
        if not count:
            return Draft()
        size, scratch.epoch = self._tree.grow(
            scratch.ahead_HD, scratch.levels_H, scratch.weights_H, count, nodes, depth, self.min_confidence,
            DISCOUNTS, STRENGTHS, *scratch.sorting, scratch.seen_V, scratch.epoch, *scratch.counting,
            *scratch.leaves, scratch.heap, *scratch.nodes,
        )  # fmt: skip
        return self._written(size, scratch)

    def _find(self, index: RowIndex, scratch: Scratch) -> int:
        """The number of hits, of the store first and then of the row itself, left in `scratch`."""
        lookup, s = self._lookup, scratch
        context = index.ids[max(0, index.length - self.max_match) : index.length]
        segments = [*s.stored, *self._arrived()]
        for g, ((tokens, suffixes), (lows, highs, _)) in enumerate(zip(segments, s.rows)):
            s.longest_G[g] = lookup.narrow(tokens, suffixes, self._known, context, lows, highs)
        count = int(lookup.plan(
            context, s.lows_GS, s.highs_GS, s.longest_G, self.hits, self.hits_per_level, s.before_GS,
            s.ranks_H, s.levels_H, s.weights_H,
        ))  # fmt: skip
        for g, ((tokens, suffixes), (lows, highs, before)) in enumerate(zip(segments, s.rows)):
            lookup.gather(
                tokens, suffixes, self._known, lows, highs, s.longest_G[g], before, s.ranks_H, s.levels_H, count,
                s.ahead_HD,
            )  # fmt: skip
        if self.context_hits:
            count = int(lookup.gather_row(
                index.ids, index.length, self._vocab, index.heads, index.previous, 4 * self.context_hits,
                self.max_match, self.context_lead, self.context_weight, count, count + self.context_hits, s.ahead_HD,
                s.levels_H, s.weights_H,
            ))  # fmt: skip
        return count

    def _written(self, size: int, scratch: Scratch) -> Draft:
        """The nodes as a draft; they come most probable first, so siblings are tried in that order."""
        tokens, parents, depths, probs = (array[:size] for array in scratch.nodes)
        confidences = np.interp(probs, BLENDED, ACCEPTED).tolist()
        draft = Draft(tokens=tokens.tolist(), parents=parents.tolist(), depths=depths.tolist())
        trials, children, source = draft.trials, draft._children, self.name
        for node, (token, parent, confidence) in enumerate(zip(draft.tokens, draft.parents, confidences)):
            children[parent, token] = node
            trial = Trial(node, OUTRIGHT, source, confidence)
            if parent in trials:
                trials[parent].append(trial)
            else:
                trials[parent] = [trial]
        return draft


def kernels() -> tuple[ModuleType, ModuleType]:
    """The compiled modules (lookup, tree), which need numba."""
    try:
        from draftsmith.retrieval.rest import lookup as rest_lookup
        from draftsmith.retrieval.rest import tree as rest_tree
    except ImportError as error:
        raise ValueError(
            "REST needs numba, which the extra `retrieval` installs: pip install 'draftsmith[retrieval]'"
        ) from error
    return rest_lookup, rest_tree
