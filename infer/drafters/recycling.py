"""Token Recycling (arXiv 2408.08696): draft what the target itself found likely, when it last read the same tokens.

Every pass scores many nodes, and what the target would have said after each of them is usually thrown away. Here it is
kept, refused nodes and prompts included, in tables from the last tokens read to the likeliest next ones: by the last
token as in the paper, and by the last `max_key` tokens, longest first. A draft grows through the tables, best first.

A candidate's confidence is the share of such candidates that came true, learned while decoding: by the band of the
row's temperature, the keys that were found, the rank, and the share of the probability that the target gave it then.
Each committed token grades all candidates for its place, drafted or not. The tables and the rates outlive rows. Nothing
is trained or stored.

Legend: N nodes, K likeliest tokens, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from draftsmith.infer.contract.arguments import at_least
from draftsmith.infer.contract.draft import Draft
from draftsmith.infer.contract.protocols import Budget, Feedback, PassTimer, Target, Verdict
from draftsmith.infer.contract.row import Row
from draftsmith.infer.contract.top_tokens import TopTokens, no_top
from draftsmith.infer.costs.calibration import band_of
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.costs.rates import Rate
from draftsmith.infer.drafters.tree_builder import Candidate, Growth, grow_looked_up

# Ranges of the share that a candidate had of the probability of the K likeliest.
SHARES = np.array([0.01, 0.03, 0.08, 0.16, 0.3, 0.5, 0.7, 0.85, 0.95])
MIDDLES = (0.005, 0.02, 0.05, 0.12, 0.22, 0.4, 0.6, 0.78, 0.9, 0.98)
# Before anything was seen: how much of its share a candidate is worth by the length of its key, if no longer one was
# found; and one that a longer key does not name.
TRUST, TRUST_BEHIND = (0.0, 0.5, 0.7, 0.8), 0.15
# This prior counts like so much evidence; decay of a rate per observation.
WEIGHT, KEPT = 6.0, 0.998


class TopTable:
    """The likeliest next tokens by the last `length` tokens: the newest `entries` keys that were written.

    A slot holds K ids and their ranges of probability."""

    def __init__(self, length: int, entries: int, k: int) -> None:
        self.length = length
        self.entries = entries
        self._slots: dict[tuple[int, ...], int] = {}
        self._ids_SK = np.zeros((0, k), np.int32)
        self._bins_SK = np.zeros((0, k), np.uint8)

    def __len__(self) -> int:
        return len(self._slots)

    def put(self, key: tuple[int, ...], ids_K: np.ndarray, bins_K: np.ndarray) -> None:
        """Write an entry in place of the oldest one, or of what the key had."""
        slot = self._slots.pop(key, -1)
        if slot < 0 and len(self._slots) == self.entries:
            slot = self._slots.pop(next(iter(self._slots)))
        elif slot < 0:
            slot = len(self._slots)
            if slot == len(self._ids_SK):
                more = min(max(2 * slot, 256), self.entries)
                self._ids_SK, self._bins_SK = (
                    np.concatenate([old, np.zeros((more - slot, old.shape[1]), old.dtype)])
                    for old in (self._ids_SK, self._bins_SK)
                )
        self._slots[key] = slot
        self._ids_SK[slot], self._bins_SK[slot] = ids_K, bins_K

    def get(self, key: tuple[int, ...]) -> tuple[list[int], list[int]] | None:
        """Ids, likeliest first, and their ranges."""
        slot = self._slots.get(key)
        return None if slot is None else (self._ids_SK[slot].tolist(), self._bins_SK[slot].tolist())


class Recycling:
    """Drafts from the target's own likeliest tokens.

    Args:
        nodes: the most nodes of a draft.
        num_draft_tokens: the deepest that a draft goes.
        top_k: how many of the likeliest tokens to keep of each place.
        max_key: the most tokens that a key has.
        entries: how many keys of each length to keep.
        calibration: how often candidates of each confidence are accepted: a file, auto (what `draftsmith calibrate`
            measured for this target, if it did) or none.
        costs: measured costs of the target's passes: a file, auto or none. With costs, each tree is cut to the nodes
            worth verifying.
    """

    name = "recycle"
    drafts_unread = True
    forward_seconds = 0.0
    bytes_moved = 0
    origin = ""

    def __init__(
        self,
        nodes: int = 24,
        num_draft_tokens: int = 8,
        top_k: int = 8,
        max_key: int = 2,
        entries: int = 1 << 16,
        calibration: Any = "auto",
        costs: Any = "auto",
    ) -> None:
        at_least(1, nodes=nodes, num_draft_tokens=num_draft_tokens, top_k=top_k, max_key=max_key, entries=entries)
        self.features: tuple[str, ...] = (f"top:{top_k}",)
        self.nodes = nodes
        self.num_draft_tokens = num_draft_tokens
        self.top_k = top_k
        self.max_key = max_key
        self.entries = entries
        self.calibration = calibration
        self.costs = costs
        self.clear()

    def clear(self) -> None:
        """Forget all tables and rates."""
        self._tables = [TopTable(length, self.entries, self.top_k) for length in range(self.max_key, 0, -1)]
        self._rates: dict[str, SourceRates] = {}

    def pass_timers(self) -> dict[str, PassTimer]:
        return {}

    def bind(self, target: Target) -> None:
        """What another target found likely is forgotten."""
        self.clear()
        self.top_k = min(self.top_k, target.vocab_size)

    def open(self, rows: Sequence[Row]) -> None:
        pass

    def close(self, rows: Sequence[Row]) -> None:
        pass

    def abandon(self, rows: Sequence[Row]) -> None:
        pass

    def read(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        for row, one in zip(rows, feedback):
            if one.top is not None:
                self._write(row, one.top)
            elif one.count:
                raise no_top(self.name)

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        """Grade what the tables said before this step, then write what it brought."""
        for row, verdict in zip(rows, verdicts):
            rates, first = self._rates_of(row), len(row.ids) - len(verdict.committed)
            for place in range(first, len(row.ids)):
                rates.observe(self._known(row.ids[max(place - self.max_key, 0) : place]), row.ids[place])
        for row, one in zip(rows, feedback):
            if one.top is None:
                raise no_top(self.name)
            self._write(row, one.top)

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget], policy: Policy | None = None) -> list[Draft]:
        return [self._draft(row, budget) for row, budget in zip(rows, budgets)]

    def _draft(self, row: Row, budget: Budget) -> Draft:
        limit = Budget(min(self.nodes, budget.nodes), min(self.num_draft_tokens, budget.depth))
        growth, rates, tail = Growth(limit), self._rates_of(row), row.ids[-self.max_key :]

        def below(leaf: int) -> list[Candidate]:
            """The candidates that the tree would keep."""
            return rates.candidates(self._known(context(leaf)), self.name, growth.reach(leaf), growth.least)

        def context(leaf: int) -> list[int]:
            path: list[int] = []
            while leaf >= 0 and len(path) < self.max_key:
                path.append(growth.leaves[leaf].candidate.token)
                leaf = growth.leaves[leaf].parent
            return [*tail, *path[::-1]][-self.max_key :]

        grow_looked_up(growth, below)
        return growth.draft()[0]

    def _rates_of(self, row: Row) -> SourceRates:
        band = band_of(row.settings.temperature)
        if band not in self._rates:
            self._rates[band] = SourceRates(self.max_key, self.top_k)
        return self._rates[band]

    def _known(self, context: Sequence[int]) -> list[tuple[int, int, int, int]]:
        """(token, state, rank, range) of the candidates behind `context`, of the longest keys first."""
        found: list[tuple[int, int, int, int]] = []
        seen: set[int] = set()
        longest = 0
        for table in self._tables:
            entry = table.get(tuple(context[-table.length :]))
            if entry is None:
                continue
            longest = longest or table.length
            state = longest * (self.max_key + 1) + table.length
            for rank, (token, share) in enumerate(zip(*entry)):
                if token not in seen:
                    seen.add(token)
                    found.append((token, state, rank, share))
        return found

    def _write(self, row: Row, top: TopTokens) -> None:
        ids_NK, logits_NK = top.ids_NK[:, : self.top_k], top.logits_NK[:, : self.top_k]
        probs_NK = np.exp(logits_NK - logits_NK[:, :1])
        probs_NK /= probs_NK.sum(1, keepdims=True)
        bins_NK = np.searchsorted(SHARES, probs_NK, side="right")
        before = tuple(row.ids[max(top.start + 1 - self.max_key, 0) : top.start])
        contexts: list[tuple[int, ...]] = []
        for token, parent, ids_K, bins_K in zip(top.tokens, top.parents, ids_NK, bins_NK):
            above = before if parent < 0 else contexts[parent]
            context = (*above, token)[-self.max_key :]
            contexts.append(context)
            if ids_K[0] < 0:
                continue
            for table in self._tables:
                if table.length <= len(context):
                    table.put(context[-table.length :], ids_K, bins_K)


class SourceRates:
    """One band's rates: how often a candidate came true, by its state (the longest key found, and its own), rank and
    range of probability."""

    def __init__(self, max_key: int, k: int) -> None:
        self._rates: dict[tuple[int, int, int], Rate] = {}
        self._max_key = max_key
        priors = [[self._prior(state, share) for share in range(len(MIDDLES))] for state in range((max_key + 1) ** 2)]
        self._values = [[list(prior) for _ in range(k)] for prior in priors]

    def _prior(self, state: int, share: int) -> float:
        longest, own = divmod(state, self._max_key + 1)
        trust = TRUST[min(own, len(TRUST) - 1)] if longest == own else TRUST_BEHIND
        return trust * MIDDLES[share]

    def candidates(
        self, known: Sequence[tuple[int, int, int, int]], source: str, above: float = 1.0, least: float = -1.0
    ) -> list[Candidate]:
        """Best first. Below a node of the reach `above`, only those of more reach than `least`."""
        rates = [(self._values[state][rank][share], token) for token, state, rank, share in known]
        found = [Candidate(token, rate, source) for rate, token in rates if above * rate > least]
        found.sort(key=lambda one: -one.confidence)
        return found

    def observe(self, known: Sequence[tuple[int, int, int, int]], token: int) -> None:
        for other, state, rank, share in known:
            rate = self._rates.setdefault((state, rank, share), Rate())
            rate.observe(other == token, 1.0, KEPT)
            self._values[state][rank][share] = rate.value(self._prior(state, share), WEIGHT)
