"""Drafting with a small language model of the target's vocabulary: chains, top-k trees, sampled chains and trees.

Classic speculative sampling (arXiv 2211.17192) drafts one chain; sampled trees follow SpecInfer (2305.09781, with
replacement) and Sequoia (2402.12374, without). The draft model has a tree cache of its own: what the target accepts of
its tree stays where it was computed, and nothing is ever read twice.

This module does not know how drafts are verified.

Legend: B rows, Q queries, V vocabulary, K candidates.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from draftsmith.infer.architectures import max_positions, prepare
from draftsmith.infer.builder import Candidate, Growth, grow
from draftsmith.infer.cached_lm import CachedLM, Entries
from draftsmith.infer.contract import Budget, Feedback, Target, Verdict
from draftsmith.infer.keyed import uniform
from draftsmith.infer.law import draw_by_inversion
from draftsmith.infer.models import check_same_tokenizer, load_model
from draftsmith.infer.row import Row
from draftsmith.infer.tree import ROOT, Draft, Group

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from draftsmith.infer.measure.latency import Lab

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Open:
    """One row's bookkeeping: how many pending tokens were run, and which entry in flight holds which draft node."""

    pending: int = 0
    entry_of: dict[int, int] = field(default_factory=dict)


class SmallLM:
    """A small causal LM as drafter.

    Args:
        model: a folder, a Hub name, or a model that is already there.
        num_draft_tokens: how deep to draft.
        top_k: children per node; 1 drafts a chain, which is what a target that takes no trees wants.
        nodes: the most nodes of a tree.
        width: how many nodes of a row the draft model expands per pass.
        min_confidence: go no deeper below a node whose probability, multiplied down from the root, is under this.
        sample: draw from the draft's own law (at the row's temperature and truncation) instead of taking the likeliest;
            a greedy row is drafted for greedily all the same.
        replacement: for sampled trees, whether the children of a node are drawn independently.
        dtype: of the weights, where `model` is a name.
        device: likewise.
    """

    name = "small"
    features: tuple[str, ...] = ()

    def __init__(
        self,
        model: Any,
        num_draft_tokens: int = 4,
        top_k: int = 4,
        nodes: int = 14,
        width: int = 2,
        min_confidence: float = 0.15,
        sample: bool = False,
        replacement: bool = False,
        dtype: str = "auto",
        device: str = "auto",
    ) -> None:
        for what, value in (
            ("num_draft_tokens", num_draft_tokens), ("top_k", top_k), ("nodes", nodes), ("width", width)
        ):  # fmt: skip
            if value < 1:
                raise ValueError(f"{what} must be at least 1, not {value}")
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.home = model if isinstance(model, str) else ""
        if isinstance(model, str):
            model, self.tokenizer = load_model(model, dtype=dtype, device=device, for_decoding=True)
        self.num_draft_tokens = num_draft_tokens
        self.top_k = top_k
        self.nodes = nodes
        self.width = width
        self.min_confidence = min_confidence
        self.sample = sample
        self.replacement = replacement
        self.lm = CachedLM(model.eval(), prepare(model))
        self.model = model
        self.exit_sources = {int(model.config.get_text_config().num_hidden_layers): self.name}
        self.draft_vocab_size = int(model.config.get_text_config().vocab_size)
        self.max_positions = max_positions(model.config.get_text_config())
        self._vocab_size = self.draft_vocab_size
        self._open: dict[Row, _Open] = {}

    @property
    def forward_seconds(self) -> float:
        return self.lm.forward_seconds

    @property
    def bytes_moved(self) -> int:
        return self.lm.bytes_moved

    def labs(self) -> dict[str, Lab]:
        """What there is to time: the draft model's own passes."""
        from draftsmith.infer.measure.latency import CachedLab

        return {self.name: CachedLab(self.lm)}

    def bind(self, target: Target) -> None:
        check_same_tokenizer(
            self.tokenizer, self.draft_vocab_size, target.tokenizer, target.vocab_size, "the draft model"
        )
        self._vocab_size = min(self.draft_vocab_size, target.vocab_size)

    def open(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        fitting = []
        for row in rows:
            self._open[row] = _Open()
            if len(row.ids) < self.max_positions:
                fitting.append(row)
        for row in fitting:
            self.lm.open(row, min(len(row.ids) + row.left + self.nodes + 2, self.max_positions + self.nodes))
        self.lm.prefill(fitting, [row.ids[:-1] for row in fitting])

    def close(self, rows: Sequence[Row]) -> None:
        for row in rows:
            del self._open[row]
            if self.lm.has(row):
                self.lm.close(row)

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget]) -> list[Draft]:
        drafts = [Draft() for _ in rows]
        limits = [self._limit(row, budget) for row, budget in zip(rows, budgets)]
        able = [b for b, limit in enumerate(limits) if limit.nodes and limit.depth]
        drawn = [b for b in able if self.sample and not rows[b].settings.greedy]
        outright = [b for b in able if b not in drawn]
        if outright:
            made = self._outright([rows[b] for b in outright], [limits[b] for b in outright])
            drafts = [made[outright.index(b)] if b in outright else draft for b, draft in enumerate(drafts)]
        if drawn:
            made = self._sampled([rows[b] for b in drawn], [limits[b] for b in drawn])
            drafts = [made[drawn.index(b)] if b in drawn else draft for b, draft in enumerate(drafts)]
        return drafts

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        for row, verdict in zip(rows, verdicts):
            state = self._open[row]
            if not self.lm.has(row) or not self.lm.flight(row):
                continue
            kept = list(range(state.pending))
            for node in verdict.kept_path:
                if node not in state.entry_of:
                    break
                kept.append(state.entry_of[node])
            self.lm.commit(row, kept)

    def _limit(self, row: Row, budget: Budget) -> Budget:
        """What the draft's own settings and context leave of the budget."""
        if not self.lm.has(row):
            return Budget(0, 0)
        room = self.max_positions - len(row.ids)
        depth = min(self.num_draft_tokens, budget.depth, max(room, 0))
        if depth < 1 <= budget.depth:
            log.warning("row %s is longer than the draft model's context of %d: not drafted", row.key, room)
        return Budget(min(self.nodes, budget.nodes) if self.top_k > 1 else min(depth, budget.nodes), depth)

    # likeliest tokens: a chain, or a tree through the one builder

    def _outright(self, rows: Sequence[Row], limits: Sequence[Budget]) -> list[Draft]:
        growths = [Growth(limit) for limit in limits]
        entries: list[dict[int, int]] = [{} for _ in rows]

        def expand(asked: list[tuple[int, list[int]]]) -> list[list[list[Candidate]]]:
            batch = [self._entries(rows[b], growths[b], leaves, entries[b]) for b, leaves in asked]
            logits_BQV, _ = self.lm.forward([rows[b] for b, _ in asked], batch)
            wanted = [(i, len(entry.tokens) - len(leaves)) for i, (entry, (_, leaves)) in enumerate(zip(batch, asked))]
            return self._candidates(logits_BQV, [(i, first, len(asked[i][1])) for i, first in wanted])

        grow(growths, expand, width=self.width if self.top_k > 1 else 1, min_worth=self.min_confidence)
        drafts = []
        for row, growth, entry in zip(rows, growths, entries):
            draft, nodes = growth.draft()
            self._open[row].entry_of = {nodes[leaf]: at for leaf, at in entry.items() if leaf in nodes}
            drafts.append(draft)
        return drafts

    def _entries(self, row: Row, growth: Growth, leaves: list[int], entry_of: dict[int, int]) -> Entries:
        """The tokens to run: the pending ones in the first round, then leaves below the entries of their parents."""
        state = self._open[row]
        if leaves == [ROOT]:
            pending = row.ids[self.lm.length(row) :]
            state.pending = len(pending)
            return Entries.chain(pending)
        parents = []
        flight = self.lm.flight(row)
        for i, leaf in enumerate(leaves):
            above = growth.leaves[leaf].parent
            parents.append(state.pending - 1 if above == ROOT else entry_of[above])
            entry_of[leaf] = flight + i
        return Entries([growth.leaves[leaf].candidate.token for leaf in leaves], parents)

    def _candidates(self, logits_BQV: torch.Tensor, wanted: list[tuple[int, int, int]]) -> list[list[list[Candidate]]]:
        """The top-k tokens with their probabilities at queries first .. first + count - 1 of each row."""
        picked = [logits_BQV[b, first : first + count, : self._vocab_size] for b, first, count in wanted]
        logits_NV = torch.cat(picked).float() if len(picked) > 1 else picked[0].float()
        top_NK = torch.topk(logits_NV, min(self.top_k, self._vocab_size), dim=-1)
        probs_NK = (top_NK.values - torch.logsumexp(logits_NV, -1, keepdim=True)).exp().tolist()
        tokens_NK = top_NK.indices.tolist()
        found, n = [], 0
        for _, _, count in wanted:
            rows = []
            for i in range(n, n + count):
                rows.append([Candidate(t, c, self.name) for t, c in zip(tokens_NK[i], probs_NK[i])])
            found.append(rows)
            n += count
        return found

    # drawn tokens: append-only, the structure decided before each draw

    def _sampled(self, rows: Sequence[Row], limits: Sequence[Budget]) -> list[Draft]:
        drafts = [Draft() for _ in rows]
        frontier = [[ROOT] for _ in rows]
        for depth in range(max(limit.depth for limit in limits)):
            live = [b for b in range(len(rows)) if frontier[b] and depth < limits[b].depth]
            if not live:
                break
            batch = [self._sampled_entries(rows[b], drafts[b], frontier[b]) for b in live]
            logits_BQV, _ = self.lm.forward([rows[b] for b in live], batch)
            for i, b in enumerate(live):
                first = len(batch[i].tokens) - len(frontier[b])
                logits_QV = logits_BQV[i, first : first + len(frontier[b]), : self._vocab_size]
                frontier[b] = self._draw(rows[b], drafts[b], frontier[b], logits_QV, limits[b])
        return drafts

    def _sampled_entries(self, row: Row, draft: Draft, frontier: list[int]) -> Entries:
        state = self._open[row]
        if frontier == [ROOT]:
            state.entry_of = {}
            pending = row.ids[self.lm.length(row) :]
            state.pending = len(pending)
            return Entries.chain(pending)
        flight = self.lm.flight(row)
        parents = []
        for i, node in enumerate(frontier):
            above = draft.parents[node]
            parents.append(state.pending - 1 if above == ROOT else state.entry_of[above])
            state.entry_of[node] = flight + i
        return Entries([draft.tokens[node] for node in frontier], parents)

    def _draw(self, row: Row, draft: Draft, frontier: list[int], logits_QV: torch.Tensor, limit: Budget) -> list[int]:
        """Draw the children of each frontier node; returns the distinct new nodes, in order.

        How many are drawn is settled before the draw, from the nodes that are there already.
        """
        made: list[int] = []
        for q, parent in enumerate(frontier):
            count = min(self.top_k, limit.nodes - len(draft))
            if count < 1:
                break
            law_V = self._law(row, draft, parent, logits_QV[q])
            group = Group(law_V, with_replacement=self.replacement)
            left_V = law_V
            for i in range(count):
                if not self.replacement and i and not float(left_V.sum()) > 0:
                    break
                number = (parent + 1) * self.top_k + i
                level = uniform(
                    row.settings.seed, row.key, len(row.ids) + draft.depths[parent] if parent != ROOT else len(row.ids),
                    "draft", number,
                )  # fmt: skip
                token = draw_by_inversion(left_V, level)
                known = draft.child(parent, token)
                node = draft.sampled(parent, token, group, self.name, float(left_V[token] / left_V.sum()))
                if known is None:
                    made.append(node)
                if not self.replacement:
                    left_V = left_V.clone()
                    left_V[token] = 0.0
        return made

    def _law(self, row: Row, draft: Draft, node: int, logits_V: torch.Tensor) -> torch.Tensor:
        """[V] the draft's law at a node, after the row's temperature and truncation, float64."""
        scores_1V = logits_V[None].float()
        for warper in row.settings.warpers():
            scores_1V = warper(None, scores_1V)
        return torch.softmax(scores_1V[0].double(), -1)
