"""REST (arXiv 2311.08252): draft what followed the newest tokens elsewhere, in a store or in the row's own text.

All match lengths count at once: their places, and those in the row's own text, are merged into one trie whose
probabilities blend the lengths; its best nodes are the draft. Without a match, nothing is drafted. Compiled kernels
over mapped files do the work (lookup.py, tree.py).

Legend: G segments, S levels, H hits, D places ahead, N nodes, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from draftsmith.infer.contract.arguments import at_least
from draftsmith.infer.contract.draft import OUTRIGHT, Draft, Trial
from draftsmith.infer.contract.protocols import Budget, Feedback, PassTimer, Target, Verdict
from draftsmith.infer.contract.row import Row
from draftsmith.infer.costs.policy import Policy
from draftsmith.retrieval.rest.in_memory_index import InMemoryIndex
from draftsmith.retrieval.store.segments import Manifest, Store, stream_dtype

if TYPE_CHECKING:
    from draftsmith.retrieval.rest.lookup import RowIndex

KIND = "rest"
# Smoothing of each level's counts, by matching tokens (the last entry: that many or more): the discount taken off each
# count, and the pseudo-counts of the level below. These and the defaults below were chosen on recorded chat answers to
# questions that no reported figure uses.
DISCOUNTS = np.array([0.5, 0.6, 0.7, 0.8])
STRENGTHS = np.array([16.0, 8.0, 4.0, 2.0])
# How many tokens of its prompt are added with an answer.
LEAD = 16
# Calibration: the blended probability, and the share of such tokens that was accepted.
BLENDED = np.array([0.0, 0.021, 0.144, 0.245, 0.355, 0.449, 0.552, 0.645, 0.724, 0.852, 0.963, 1.0])
ACCEPTED = np.array([0.0, 0.03, 0.123, 0.17, 0.219, 0.298, 0.355, 0.475, 0.57, 0.67, 0.899, 1.0])


class Rest:
    """Drafts from a store of documents and from the row's own text.

    Args:
        store: the store's folder (`draftsmith store build rest`); None starts with no documents.
        nodes: the most nodes of a draft.
        num_draft_tokens: how many tokens to read after each place.
        max_match: the longest match to look for, in tokens.
        hits: the most places to read in the store, longest matches first.
        hits_per_level: the most places per match length; if there are more, a sample is read.
        context_hits: the most places to read in the row's own text.
        context_weight: the weight of a place in the row's own text, in places of the store; 0 ignores the row's text.
        context_lead: how many tokens to add to the match length of such a place.
        min_confidence: leave out nodes whose path is less probable than this.
        threads: how many rows of a batch to look up at the same time.
        verify: compare the store with its checksums when it is opened, instead of checking file sizes only.
        max_mapped_mb: read a larger store through a cache instead of mapping it into memory. A mapped store counts as
            this process's memory as its pages are touched, in the end all of them.
        cache_mb: size of that cache, shared by all threads.
        max_arrived: how many tokens of documents added while drafting to keep in memory, newest first.
        learn: also draft from the answers that were finished so far; None: only without a store. They are kept in
            memory and forgotten when the process ends.
        calibration: how often candidates of each confidence are accepted: a file, auto (what `draftsmith calibrate`
            measured for this store and target, if it did) or none.
        costs: measured costs of the target's passes: a file, auto or none. With costs, each tree is cut to the nodes
            worth verifying.
    """

    name = KIND
    features: tuple[str, ...] = ()
    drafts_unread = True
    forward_seconds = 0.0
    bytes_moved = 0

    def __init__(
        self,
        store: str | None = None,
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
        learn: bool | None = None,
        calibration: Any = "auto",
        costs: Any = "auto",
    ) -> None:
        at_least(1, nodes=nodes, num_draft_tokens=num_draft_tokens, max_match=max_match, hits=hits)
        at_least(1, hits_per_level=hits_per_level, threads=threads)
        if min(context_weight, context_lead, context_hits, min_confidence, max_mapped_mb) < 0:
            raise ValueError(
                "context_weight, context_lead, context_hits, min_confidence and max_mapped_mb must not be negative"
            )
        if store == "":
            raise ValueError("the store's name is empty: give its folder, or leave it out to start with no documents")
        self.path = None if store is None else Path(store).expanduser()
        self.origin = "" if self.path is None else str(self.path)
        self.learns = self.path is None if learn is None else learn
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
        self.calibration = calibration
        self.costs = costs
        self._indexes: dict[Row, RowIndex] = {}
        self._pool: ThreadPoolExecutor | None = None

    def pass_timers(self) -> dict[str, PassTimer]:
        return {}

    def bind(self, target: Target) -> None:
        """Open the store, check that it fits the target, and compile the kernels (or load them from numba's cache).

        What was learned before is forgotten.
        """
        try:
            from draftsmith.retrieval.rest import lookup, tree
        except ImportError as error:
            raise ValueError("REST needs numba: pip install 'draftsmith[retrieval]'") from error
        self._lookup, self._tree = lookup, tree
        self._mapped, self._known, self._vocab = [], target.vocab_size, target.vocab_size
        dtype = stream_dtype(self._vocab)
        stored: list[list[tuple[Any, Any]]] = [[] for _ in range(self.threads)]
        if self.path is not None:
            store, filed = self._open(self.path, target)
            self._store = store  # its files are open as long as it lives
            self._mapped = [(segment.tokens, segment.arrays["suffixes"]) for segment in store.segments]
            self._known, dtype = store.manifest.vocab_size, np.dtype(store.manifest.dtype)
            stored = [self._cached(store) if filed else self._mapped for _ in range(self.threads)]
        sizes = (self.max_match, self.hits + self.context_hits, self.num_draft_tokens, self.num_nodes, self._vocab)
        self._scratches = [Scratch(segments, *sizes) for segments in stored]
        if self._pool is not None:
            self._pool.shutdown()
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None
        self._added = InMemoryIndex(self._known, dtype, self.max_arrived)
        first = [int(token) for token in self._mapped[0][0][:2]] if self._mapped else [0, 0]
        if self.learns:
            # An answer that is added later must not be the first to need what is missing.
            self.add_document(first)
        self._draft(lookup.RowIndex(), first * 2, Budget(1, 1), self._scratches[0])
        self._added.clear()
        self._cover()

    def open(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._indexes[row] = self._lookup.RowIndex()

    def read(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        pass

    def close(self, rows: Sequence[Row]) -> None:
        for row in rows:
            del self._indexes[row]

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        pass

    def add_answer(self, row: Row) -> None:
        """Also draft from this answer, and from the end of its prompt: what an answer begins with follows on that."""
        self.add_document(row.ids[max(row.prompt_tokens - LEAD, 0) :])

    def add_document(self, ids: Sequence[int]) -> None:
        """Also draft from this document. It is kept in memory; the store does not change."""
        self._added.add_document(ids)
        self._cover()

    def _cover(self) -> None:
        for scratch in self._scratches:
            scratch.cover(len(self._mapped) + len(self._added.runs))

    def holds(self, ids: Sequence[int]) -> bool:
        """Whether `ids` occur consecutively in a document of the store or an added one."""
        ids_T = np.asarray(ids, np.int64)
        segments = [*self._mapped, *self._runs()]
        return any(self._lookup.contains(tokens, suffixes, self._known, ids_T) for tokens, suffixes in segments)

    def _open(self, path: Path, target: Target) -> tuple[Store, bool]:
        """The store, and whether it is too large to be mapped into memory."""
        mapped = Manifest.read(path, KIND).bytes <= self.max_mapped_mb * 2**20 or not hasattr(os, "pread")
        filed = () if mapped else ("tokens", "suffixes")
        store = Store.open(path, KIND, "checksums" if self.verify else "sizes", filed)
        if target.tokenizer is not None:
            store.check_tokenizer(target.tokenizer)
        if store.manifest.vocab_size > target.vocab_size:
            raise ValueError(
                f"the store {path} was built for {store.manifest.vocab_size} token ids; the target has "
                f"{target.vocab_size}"
            )
        return store, not mapped

    def _cached(self, store: Store) -> list[tuple[Any, Any]]:
        """Each segment's tokens and suffixes, read from their files through one cache."""
        from draftsmith.retrieval.rest.stream_access import PageCache

        files = [segment.files[part] for segment in store.segments for part in ("tokens", "suffixes")]
        arrays = PageCache(self.cache_mb / self.threads).over(files)
        return list(zip(arrays[::2], arrays[1::2]))

    def _runs(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(run.tokens, run.suffixes) for run in self._added.runs]

    def abandon(self, rows: Sequence[Row]) -> None:
        pass

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget], policy: Policy | None = None) -> list[Draft]:
        work = [(self._indexes[row], row.ids, budget) for row, budget in zip(rows, budgets)]
        return self._drafts(work)

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
        index.catch_up(ids)
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
        return self._to_draft(size, scratch)

    def _find(self, index: RowIndex, scratch: Scratch) -> int:
        """Write the hits to `scratch`, the store's first and then the row's own; returns how many there are."""
        lookup, s = self._lookup, scratch
        context = index.ids[max(0, index.length - self.max_match) : index.length]
        segments = [*s.stored, *self._runs()]
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

    def _to_draft(self, size: int, scratch: Scratch) -> Draft:
        """The nodes as a draft. They come most probable first, so siblings are tried in that order."""
        tokens, parents, depths, probs = (array[:size] for array in scratch.nodes)
        confidences = np.interp(probs, BLENDED, ACCEPTED).tolist()
        draft = Draft(tokens=tokens.tolist(), parents=parents.tolist(), depths=depths.tolist())
        children, source = draft._children, self.name
        for node, (token, parent, confidence) in enumerate(zip(draft.tokens, draft.parents, confidences)):
            children[parent, token] = node
            draft.trials.setdefault(parent, []).append(Trial(node, OUTRIGHT, source, confidence))
        return draft


class Scratch:
    """The arrays that the compiled kernels (lookup.py, tree.py) write to; one thread reuses them for every draft.

    `stored` is what each segment's tokens and suffixes are read from; a cache belongs to one thread. The number of
    segments may grow (cover); the other sizes follow from the drafter's settings.
    """

    def __init__(
        self, stored: Sequence[tuple[Any, Any]], levels: int, hits: int, ahead: int, nodes: int, vocab: int
    ) -> None:
        self.stored = stored
        self.levels = levels
        self.cover(len(stored))
        self.ranks_H, self.levels_H, self.weights_H = _ints(hits), _ints(hits), np.zeros(hits)
        self.ahead_HD = _ints(hits, ahead)
        # In the order of grow()'s arguments: per hit, per token, per level and child, per child.
        self.sorting = [_ints(hits), _ints(hits), _ints(hits)]
        self.seen_V = _ints(vocab)
        self.counting = [
            np.zeros((levels + 1, hits)), np.zeros(levels + 1), np.zeros(hits), _ints(hits), _ints(hits + 1)
        ]  # fmt: skip
        # At each depth, a hit is below at most one leaf.
        most = hits * ahead
        self.leaves = [*(_ints(most) for _ in range(5)), np.zeros(most), np.zeros(most)]
        self.heap = _ints(most)
        self.nodes = [_ints(nodes), _ints(nodes), _ints(nodes), np.zeros(nodes)]
        self.epoch = 0

    def cover(self, segments: int) -> None:
        """Make room for the intervals of `segments` segments."""
        self.lows_GS, self.highs_GS, self.before_GS = (_ints(segments, self.levels) for _ in range(3))
        self.longest_G = _ints(segments)
        self.rows = list(zip(self.lows_GS, self.highs_GS, self.before_GS))


def _ints(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int64)
