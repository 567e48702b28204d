"""Drafting with a language model of the target's vocabulary: chains, top-k trees, sampled chains and trees.

Classic speculative sampling (arXiv 2211.17192) drafts one chain; sampled trees follow SpecInfer (2305.09781, with
replacement) and Sequoia (2402.12374, without). The draft model has a tree cache of its own: what the target accepts of
its tree stays where it was computed, and nothing is ever read twice.

How the model is run, whole or as deep as a node wants, is the reader's (reading.py). This module does not know how
drafts are verified.

Legend: B rows, Q queries, N nodes, V vocabulary, K candidates.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from draftsmith.infer.contract.distribution import draw_by_inversion
from draftsmith.infer.contract.draft import ROOT, Draft, Group
from draftsmith.infer.contract.protocols import Budget, Verdict
from draftsmith.infer.contract.rng import uniform
from draftsmith.infer.contract.row import Row
from draftsmith.infer.costs.calibration import Calibration
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.drafters.draft_forward import DraftForward
from draftsmith.infer.drafters.tree_builder import Candidate, Growth, grow
from draftsmith.infer.models.architectures import max_positions
from draftsmith.infer.models.cached_lm import Entries

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """How far a draft may go: depth, children per node, nodes, nodes expanded per pass; below `min_confidence` nothing
    is expanded where no costs are known. `sample`: draw from the draft's own distribution, with or without
    replacement."""

    num_draft_tokens: int
    top_k: int
    nodes: int
    width: int
    min_confidence: float
    sample: bool = False
    replacement: bool = False

    def __post_init__(self) -> None:
        for what in ("num_draft_tokens", "top_k", "nodes", "width"):
            if getattr(self, what) < 1:
                raise ValueError(f"{what} must be at least 1, not {getattr(self, what)}")


@dataclass(slots=True)
class _Open:
    """One row's bookkeeping: how many pending tokens were run, which uncommitted entry holds which draft node, and the
    draft, and whether it was drawn."""

    pending: int = 0
    draft: Draft = field(default_factory=Draft)
    drawn: bool = False
    entry_of: dict[int, int] = field(default_factory=dict)


class LMDrafter:
    """Drafts with the model behind `reader`. `sources` tells whom to credit per exit (0: a model without exits)."""

    def __init__(self, reader: DraftForward, config: Any, limits: Limits, sources: Mapping[int, str]) -> None:
        self.reader = reader
        self.limits = limits
        self.sources = sources
        self.draft_vocab_size = int(config.vocab_size)
        self.max_positions = max_positions(config)
        self.vocab_size = self.draft_vocab_size
        self.calibration: Calibration | None = None
        self.policy: Policy | None = None
        self._open: dict[Row, _Open] = {}

    def know(self, vocab_size: int, calibration: Calibration | None, policy: Policy | None) -> None:
        """Take what is known of the target: its vocabulary, calibrated confidences, the accounts."""
        self.vocab_size = min(self.draft_vocab_size, vocab_size)
        self.calibration, self.policy, self.reader.policy = calibration, policy, policy

    def open(self, rows: Sequence[Row]) -> None:
        lm = self.reader.lm
        fitting = []
        for row in rows:
            self._open[row] = _Open()
            if len(row.ids) < self.max_positions:
                fitting.append(row)
        nodes = self.limits.nodes
        for row in fitting:
            lm.open(row, min(len(row.ids) + row.left + nodes + 2, self.max_positions + nodes))
        self.reader.prefill(fitting, [row.ids[:-1] for row in fitting])

    def close(self, rows: Sequence[Row]) -> None:
        for row in rows:
            del self._open[row]
            if self.reader.lm.has(row):
                self.reader.lm.close(row)

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget]) -> list[Draft]:
        drafts = [Draft() for _ in rows]
        limits = [self._limit(row, budget) for row, budget in zip(rows, budgets)]
        able = [b for b, limit in enumerate(limits) if limit.nodes and limit.depth]
        drawn = [b for b in able if self.limits.sample and not rows[b].settings.greedy]
        outright = [b for b in able if b not in drawn]
        if self.policy is not None:
            self.policy.begin([len(row.ids) for row in rows])
        for some, make in ((outright, self._outright), (drawn, self._sampled)):
            if some:
                for b, draft in zip(some, make([rows[b] for b in some], [limits[b] for b in some])):
                    drafts[b] = draft
        for b, (row, draft) in enumerate(zip(rows, drafts)):
            self._open[row].draft, self._open[row].drawn = draft, b in drawn
        return drafts

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
        lm = self.reader.lm
        for row, verdict in zip(rows, verdicts):
            state = self._open[row]
            if not lm.has(row) or not lm.uncommitted(row):
                continue
            kept = list(range(state.pending))
            for node in verdict.kept_path:
                if node not in state.entry_of:
                    break
                kept.append(state.entry_of[node])
            lm.commit(row, kept)
        if self.policy is not None:
            nodes = max(len(self._open[row].draft) for row in rows)
            self.policy.settle(nodes, sum(len(verdict.committed) for verdict in verdicts))
            self._note_drawn([self._open[row] for row in rows], verdicts, self.policy)

    def _note_drawn(self, states: Sequence[_Open], verdicts: Sequence[Verdict], policy: Policy) -> None:
        """How often one of a reached node's drawn children was right: no distribution tells that beforehand."""
        right = reached = 0
        for state, verdict in zip(states, verdicts):
            if state.drawn:
                right += len(verdict.path)
                reached += sum(node in state.draft.trials for node in (ROOT, *verdict.path))
        if any(state.drawn for state in states):
            policy.covered(right / reached if reached else None)

    def _limit(self, row: Row, budget: Budget) -> Budget:
        """What the draft's own settings and context leave of the budget."""
        if not self.reader.lm.has(row):
            return Budget(0, 0)
        room = self.max_positions - len(row.ids)
        depth = min(self.limits.num_draft_tokens, budget.depth, max(room, 0))
        if depth < 1 <= budget.depth:
            log.warning("row %s is longer than the draft model's context of %d: not drafted", row.key, room)
        return Budget(
            min(self.limits.nodes, budget.nodes) if self.limits.top_k > 1 else min(depth, budget.nodes), depth
        )

    def _pending(self, rows: Sequence[Row]) -> list[int]:
        """How many tokens of each row the draft has not read, its newest apart."""
        return [len(row.ids) - self.reader.lm.length(row) - 1 for row in rows]

    # likeliest tokens: a chain, or a tree through the one builder

    def _outright(self, rows: Sequence[Row], limits: Sequence[Budget]) -> list[Draft]:
        growths = [Growth(limit) for limit in limits]
        entries: list[dict[int, int]] = [{} for _ in rows]
        exits: list[list[tuple[int, int]]] = [[] for _ in rows]

        def expand(asked: list[tuple[int, list[int]]]) -> list[list[list[Candidate]]]:
            batch = [self._entries(rows[b], growths[b], leaves, entries[b]) for b, leaves in asked]
            worths = [[growths[b].worth(leaf) for leaf in leaves] for b, leaves in asked]
            reading = self.reader.read([rows[b] for b, _ in asked], batch, worths, self.vocab_size)
            left = iter(reading.exits)
            for b, leaves in asked if reading.exits else ():
                exits[b] += [(growths[b].depth(leaf) + 1, next(left)) for leaf in leaves]
            return self._candidates(reading.logits_NV, reading.exits, [len(leaves) for _, leaves in asked])

        grow(
            growths,
            expand,
            width=self.limits.width if self.limits.top_k > 1 else 1,
            min_worth=self.limits.min_confidence,
            policy=self.policy,
            pending=self._pending(rows) if self.policy is not None else (),
        )
        drafts = []
        for row, growth, entry, left in zip(rows, growths, entries, exits):
            draft, nodes = growth.draft()
            draft.exits = left
            self._open[row].entry_of = {nodes[leaf]: at for leaf, at in entry.items() if leaf in nodes}
            drafts.append(draft)
        return drafts

    def _entries(self, row: Row, growth: Growth, leaves: list[int], entry_of: dict[int, int]) -> Entries:
        """The tokens to run: the pending ones in the first round, then leaves below the entries of their parents."""
        state = self._open[row]
        if leaves == [ROOT]:
            pending = row.ids[self.reader.lm.length(row) :]
            state.pending = len(pending)
            return Entries.chain(pending)
        parents = []
        uncommitted = self.reader.lm.uncommitted(row)
        for i, leaf in enumerate(leaves):
            above = growth.leaves[leaf].parent
            parents.append(state.pending - 1 if above == ROOT else entry_of[above])
            entry_of[leaf] = uncommitted + i
        return Entries([growth.leaves[leaf].candidate.token for leaf in leaves], parents)

    def _candidates(
        self, logits_NV: torch.Tensor, exits: Sequence[int], counts: Sequence[int]
    ) -> list[list[list[Candidate]]]:
        """The top-k tokens of each node with their probabilities, calibrated where that is known."""
        logits_NV = logits_NV.float()
        top_NK = torch.topk(logits_NV, min(self.limits.top_k, self.vocab_size), dim=-1)
        probs_NK = (top_NK.values - torch.logsumexp(logits_NV, -1, keepdim=True)).exp().tolist()
        found = []
        for n, (tokens, probs) in enumerate(zip(top_NK.indices.tolist(), probs_NK)):
            source = self.sources[exits[n] if exits else 0]
            found.append([Candidate(t, c, source) for t, c in zip(tokens, self._calibrated(source, probs))])
        nodes = iter(found)
        return [[next(nodes) for _ in range(count)] for count in counts]

    def _calibrated(self, source: str, probs: list[float]) -> list[float]:
        return probs if self.calibration is None else self.calibration.probabilities(source, probs)

    # drawn tokens: append-only, the structure decided before each draw

    def _sampled(self, rows: Sequence[Row], limits: Sequence[Budget]) -> list[Draft]:
        drafts = [Draft() for _ in rows]
        worths: list[dict[int, float]] = [{ROOT: 1.0} for _ in rows]
        frontier = [[ROOT] for _ in rows]
        for depth in range(max(limit.depth for limit in limits)):
            asked = [(b, frontier[b]) for b in range(len(rows)) if frontier[b] and depth < limits[b].depth]
            asked = self._worth_reading(asked, worths, self._pending(rows) if depth == 0 else [0] * len(rows))
            if not asked:
                break
            live = [b for b, _ in asked]
            batch = [self._sampled_entries(rows[b], drafts[b], nodes) for b, nodes in asked]
            given = [[worths[b][node] for node in nodes] for b, nodes in asked]
            reading = self.reader.read([rows[b] for b in live], batch, given, self.vocab_size)
            frontier = [[] for _ in rows]
            at = 0
            for b, nodes in asked:
                logits_QV = reading.logits_NV[at : at + len(nodes)]
                exits = reading.exits[at : at + len(nodes)]
                at += len(nodes)
                drafts[b].exits += [(depth + 1, exit) for exit in exits]
                frontier[b] = self._draw(rows[b], drafts[b], nodes, logits_QV, exits, limits[b], worths[b])
        return drafts

    def _worth_reading(
        self, asked: list[tuple[int, list[int]]], worths: Sequence[dict[int, float]], pending: Sequence[int]
    ) -> list[tuple[int, list[int]]]:
        """Those of the drawn nodes that a pass of the draft pays for. They were drawn before: looking is allowed."""
        if self.policy is None:
            return asked
        offers = sorted(((worths[b][node], b, node) for b, nodes in asked for node in nodes), key=lambda o: -o[0])
        count = self.policy.expand([(worth, b) for worth, b, _ in offers], pending)
        chosen = {(b, node) for _, b, node in offers[:count]}
        kept = [(b, [node for node in nodes if (b, node) in chosen]) for b, nodes in asked]
        return [(b, nodes) for b, nodes in kept if nodes]

    def _sampled_entries(self, row: Row, draft: Draft, frontier: list[int]) -> Entries:
        state = self._open[row]
        if frontier == [ROOT]:
            state.entry_of = {}
            pending = row.ids[self.reader.lm.length(row) :]
            state.pending = len(pending)
            return Entries.chain(pending)
        uncommitted = self.reader.lm.uncommitted(row)
        parents = []
        for i, node in enumerate(frontier):
            above = draft.parents[node]
            parents.append(state.pending - 1 if above == ROOT else state.entry_of[above])
            state.entry_of[node] = uncommitted + i
        return Entries([draft.tokens[node] for node in frontier], parents)

    def _draw(
        self,
        row: Row,
        draft: Draft,
        frontier: list[int],
        logits_QV: torch.Tensor,
        exits: Sequence[int],
        limit: Budget,
        worths: dict[int, float],
    ) -> list[int]:
        """Draw the children of each frontier node; returns the distinct new nodes, in order.

        How many are drawn is settled before the draw, from the nodes that are there already.
        """
        made: list[int] = []
        for q, parent in enumerate(frontier):
            count = min(self._slots(worths[parent], len(draft)), limit.nodes - len(draft))
            source = self.sources[exits[q] if exits else 0]
            distribution_V = self._distribution(row, logits_QV[q])
            group = Group(distribution_V, with_replacement=self.limits.replacement)
            left_V = distribution_V
            for i in range(count):
                if not self.limits.replacement and i and not float(left_V.sum()) > 0:
                    break
                number = (parent + 1) * self.limits.top_k + i
                level = uniform(
                    row.settings.seed, row.key, len(row.ids) + draft.depths[parent] if parent != ROOT else len(row.ids),
                    "draft", number,
                )  # fmt: skip
                token = draw_by_inversion(left_V, level)
                known = draft.child(parent, token)
                confidence = float(left_V[token] / left_V.sum())
                node = draft.sampled(parent, token, group, source, confidence)
                if known is None:
                    made.append(node)
                    worths[node] = worths[parent] * self._drawn_worth(i, confidence)
                if not self.limits.replacement:
                    left_V = left_V.clone()
                    left_V[token] = 0.0
        return made

    def _drawn_worth(self, before: int, confidence: float) -> float:
        """How likely a drawn child is accepted after so many that were not. A draw from the draft's distribution is
        right about as often where that distribution gave it little as where it gave it much: the running mean says
        more."""
        if self.policy is None:
            return confidence
        return self.policy.coverage * (1 - self.policy.coverage) ** before

    def _slots(self, worth: float, nodes: int) -> int:
        """How many children to draw below a node worth so much: as long as one more is worth verifying. Each is taken
        to be right as often as the mean says, given that those before it were not; its token plays no part."""
        if self.policy is None:
            return self.limits.top_k
        coverage, count = self.policy.coverage, 0
        left = worth * coverage
        while count < self.limits.top_k and left * self.policy.seconds_per_token > self.policy.next_node(nodes + count):
            left *= 1 - coverage
            count += 1
        return count

    def _distribution(self, row: Row, logits_V: torch.Tensor) -> torch.Tensor:
        """[V] the draft's distribution at a node, after the row's temperature and truncation, float64."""
        scores_1V = logits_V[None].float()
        for warper in row.settings.warpers():
            scores_1V = warper(None, scores_1V)
        return torch.softmax(scores_1V[0].double(), -1)
