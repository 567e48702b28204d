"""Drafting with a language model of the target's vocabulary: chains and trees of likeliest, coupled or drawn tokens.

Classic speculative sampling (arXiv 2211.17192) drafts one chain; sampled trees follow SpecInfer (2305.09781, with
replacement) and Sequoia (2402.12374, without). The draft model has its own tree cache: accepted nodes stay where they
were computed, and no token is read twice. SmallLM and SD2 build an LMDrafter, each with its own forward pass.

Legend: B rows, Q queries, N nodes, V vocabulary, K candidates.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.protocols import Budget, Feedback, PassTimer, Target, Verdict
from draftsmith.infer.contract.row import Row
from draftsmith.infer.costs.pass_costs import Costs
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.drafters.coupled import Race
from draftsmith.infer.drafters.draft_model import (
    DraftForward,
    DraftLimits,
    DraftModel,
    DraftOutput,
    DrawnLimits,
    Limits,
    Reaches,
)
from draftsmith.infer.drafters.drawn import MAY_WAIT, Asked, draw
from draftsmith.infer.drafters.exit_choice import Pricing
from draftsmith.infer.drafters.tree_builder import Candidate, Growth, TreePricing, grow
from draftsmith.infer.models.load import check_same_tokenizer
from draftsmith.infer.models.positions import max_positions
from draftsmith.infer.models.runner.entries import Entries
from draftsmith.infer.models.runner.model_runner import ModelRunner

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _RowState:
    """The number of pending tokens run for a row's draft, each node's cache entry, and whether the row has outgrown the
    draft model's context."""

    pending: int = 0
    entry_of: dict[int, int] = field(default_factory=dict)
    outgrown: bool = False


class LMDrafter:
    """Drafts with `draft`, run by what `make_forward` makes of its model.

    `exit_sources`: exit (layers) -> the source that is credited.

    `calibration` and `costs` are what the user gave, for the policy to use.
    """

    features: tuple[str, ...] = ()

    def __init__(
        self,
        name: str,
        draft: DraftModel,
        make_forward: Callable[[Any], DraftForward],
        limits: DraftLimits,
        exit_sources: Mapping[int, str],
        calibration: Any,
        costs: Any,
    ) -> None:
        config = draft.model.config.get_text_config()
        self.name = name
        self.origin = draft.origin
        self.model = draft.model
        self.tokenizer = draft.tokenizer
        self.limits = limits
        self.exit_sources = exit_sources
        self.draft_vocab_size = self.vocab_size = int(config.vocab_size)
        self.max_positions = max_positions(config)
        self.calibration = calibration
        self.costs = costs
        self._draft = draft
        self._make_forward = make_forward
        self._forward = make_forward(draft.model)
        self._assumed: Costs | None = None
        self._race: Race | None = None
        self._rows: dict[Row, _RowState] = {}
        # Whether the last outright drafts paid. If not, prompts are left unread until one does.
        self._pays = True

    @property
    def lm(self) -> ModelRunner:
        return self._forward.lm

    @property
    def forward_seconds(self) -> float:
        return float(self.lm.forward_seconds)

    @property
    def bytes_moved(self) -> int:
        return int(self.lm.bytes_moved)

    @property
    def couples(self) -> bool:
        """Whether what it drafts for rows with a temperature shares the noise of the target's draws: then it is worth
        something along texts that were drawn with this noise only."""
        return self.limits.coupled is not None

    def pass_timers(self) -> dict[str, PassTimer]:
        return self._forward.pass_timers()

    def bind(self, target: Target) -> None:
        check_same_tokenizer(
            self.tokenizer, self.draft_vocab_size, target.tokenizer, target.vocab_size, "the draft model"
        )
        self.vocab_size = min(self.draft_vocab_size, target.vocab_size)
        if target.model is not None and self._draft.follow(target.model):
            self._forward = self._make_forward(self.model)
        self._assumed = self.assumed_costs(target)
        self._race = Race.of(target)

    def assumed_costs(self, target: Target) -> Costs | None:
        return self._forward.assumed_costs(target)

    def open(self, rows: Sequence[Row]) -> None:
        self._rows |= {row: _RowState() for row in rows}
        try:
            for row in rows:
                if len(row.ids) < self.max_positions:
                    self.lm.open(row, len(row.ids) + self.limits.nodes)
        except BaseException:
            self.close(rows)
            raise

    def read(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        ends = [given.start + given.count for given in feedback]
        # Rows that draw are read when their own account first drafts: `_pays` depends on other rows too.
        self._read([(row, end) for row, end in zip(rows, ends) if self._pays and not self._draws(row)])

    def _read(self, upto: Sequence[tuple[Row, int]]) -> None:
        """Read each row's tokens up to a position."""
        fitting = [(row, end) for row, end in upto if self.lm.has(row) and end < self.max_positions]
        parts = [(row, row.ids[self.lm.length(row) : end]) for row, end in fitting]
        parts = [(row, part) for row, part in parts if part]
        self._forward.prefill([row for row, _ in parts], [part for _, part in parts])

    def abandon(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._rows[row].entry_of = {}
            if self.lm.has(row):
                self.lm.shorten(row, len(row.ids) - 1)

    def close(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._rows.pop(row, None)
            if self.lm.has(row):
                self.lm.close(row)

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget], policy: Policy | None = None) -> list[Draft]:
        drafts = [Draft() for _ in rows]
        policy = self._with_costs(rows, policy)
        limits = [self._limit(row, budget, policy.costs is not None) for row, budget in zip(rows, budgets)]
        able = [b for b, limit in enumerate(limits) if limit.nodes and limit.depth]
        drawn = [b for b in able if self._draws(rows[b])]
        outright = [b for b in able if b not in drawn]
        for some, make in ((outright, self._outright), (drawn, self._drawn)):
            if some:
                for b, draft in zip(some, make([rows[b] for b in some], [limits[b] for b in some], policy)):
                    drafts[b] = draft
        return drafts

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        ended: list[Row] = []
        paths: list[list[int]] = []
        for row, verdict in zip(rows, verdicts):
            state = self._rows[row]
            if not self.lm.has(row) or not self.lm.uncommitted(row):
                continue
            kept = list(range(state.pending))
            for node in verdict.kept_path:
                if node not in state.entry_of:
                    break
                kept.append(state.entry_of[node])
            ended.append(row)
            paths.append(kept)
        self.lm.commit(ended, paths)

    def _draws(self, row: Row) -> bool:
        return self.limits.drawn is not None and not row.settings.greedy

    def _shape_of(self, row: Row) -> Limits | DrawnLimits:
        limits = self.limits
        return limits.likeliest if row.settings.greedy else limits.coupled or limits.drawn or limits.likeliest

    def _catch_up(self, rows: Sequence[Row], policy: Policy) -> None:
        """Read what the draft has not read of the rows for which drafting would pay if it had read them.

        A draft that does not pay need not read at all. Reading serves all later steps, so it is not weighed against the
        gain of this one.
        """
        paying = len(rows)
        if policy.costs is not None:
            coverage = policy.joint.coverage * policy.joint.trust
            paying = policy.joint.expand([(1.0, row) for row in rows], {}, self._forward.entry, coverage)
        self._pays = paying > 0
        behind = zip(rows[:paying], self._pending(rows[:paying]))
        self._read([(row, len(row.ids) - 1) for row, pending in behind if pending > MAY_WAIT])

    def _with_costs(self, rows: Sequence[Row], policy: Policy | None) -> Policy:
        """`policy`; if it has no costs and this draft needs some, one that has no past."""
        if (policy is None or policy.costs is None) and self._assumed is not None:
            policy = Policy(self._assumed, policy.calibrations if policy is not None else None)
            policy.begin(rows)
        return policy or Policy()

    def _limit(self, row: Row, budget: Budget, priced: bool) -> Budget:
        """The budget, cut to the drafter's own limits and the draft model's context."""
        limits = self._shape_of(row)
        depth = min(limits.depth(priced), budget.depth, max(self.max_positions - len(row.ids), 0))
        if depth < 1 <= budget.depth and not self._rows[row].outgrown:
            self._rows[row].outgrown = True
            log.warning("row %s outgrew the draft model's context of %d: not drafted", row.key, self.max_positions)
        return Budget(min(limits.nodes if limits.top_k > 1 else depth, budget.nodes), depth)

    def _pending(self, rows: Sequence[Row]) -> list[int]:
        """How many tokens of each row, without the newest, the draft has not read."""
        return [len(row.ids) - self.lm.length(row) - 1 for row in rows]

    # outright candidates, likeliest or coupled: a chain or a tree

    def _outright(self, rows: Sequence[Row], limits: Sequence[Budget], policy: Policy) -> list[Draft]:
        priced = policy.costs is not None
        self._catch_up(rows, policy)
        growths = [Growth(limit) for limit in limits]
        entries: list[dict[int, int]] = [{} for _ in rows]
        exits: list[list[tuple[int, int]]] = [[] for _ in rows]

        def expand(asked: list[tuple[int, list[int]]]) -> list[list[list[Candidate]]]:
            batch = [self._entries(rows[b], leaves, growths[b], entries[b]) for b, leaves in asked]
            reaches = [[growths[b].reach(leaf) for leaf in leaves] for b, leaves in asked]
            some = [rows[b] for b, _ in asked]
            pricing = Pricing(policy, coupled=self.couples) if priced else None
            output = self._forward.read(some, batch, reaches, self.vocab_size, pricing)
            left = iter(output.exits)
            for b, leaves in asked if output.exits else ():
                exits[b] += [(growths[b].depth(leaf) + 1, next(left)) for leaf in leaves]
            positions = [[len(rows[b].ids) + growths[b].depth(leaf) for leaf in leaves] for b, leaves in asked]
            return self._candidates(output, some, positions, policy)

        shape = self.limits.likeliest
        grow(
            growths,
            expand,
            width=shape.width if shape.top_k > 1 else 1,
            min_reach=shape.min_confidence,
            pricing=TreePricing(policy, rows, self._forward.entry, self._pending(rows)) if priced else None,
        )
        drafts = []
        for row, growth, entry, left in zip(rows, growths, entries, exits):
            draft, nodes = growth.draft()
            draft.exits = left
            self._rows[row].entry_of = {nodes[leaf]: at for leaf, at in entry.items() if leaf in nodes}
            drafts.append(draft)
        return drafts

    def _entries(self, row: Row, nodes: list[int], tree: Draft | Growth, entry_of: dict[int, int]) -> Entries:
        """What to run: the pending tokens in the first round, then nodes below the entries of their parents."""
        state = self._rows[row]
        if nodes == [ROOT]:
            pending = row.ids[self.lm.length(row) :]
            state.pending = len(pending)
            return Entries.chain(pending)
        tokens, parents = tree.tokens, tree.parents
        below = [state.pending - 1 if parents[node] == ROOT else entry_of[parents[node]] for node in nodes]
        entry_of.update({node: self.lm.uncommitted(row) + i for i, node in enumerate(nodes)})
        return Entries([tokens[node] for node in nodes], below)

    def _candidates(
        self, output: DraftOutput, rows: Sequence[Row], positions: Sequence[Sequence[int]], policy: Policy
    ) -> list[list[list[Candidate]]]:
        """Each node's candidates, best first, with their probabilities, calibrated if there is a calibration.

        `positions`: of the tokens that follow each row's nodes."""
        found, at = [], 0
        for row, some in zip(rows, positions):
            logits_NV = output.logits_NV[at : at + len(some)]
            nodes = []
            best_NK = self._best(row, logits_NV, some)
            for n, (tokens, raw) in enumerate(zip(*(each.tolist() for each in best_NK)), start=at):
                source = self._source(output.exits, n)
                raw = [one for one in raw if one > 0]  # the row's truncation may exclude some
                probs = policy.calibrated(row, source, raw, self.couples)
                nodes.append([Candidate(token, prob, source) for token, prob in zip(tokens, probs)])
            found.append(nodes)
            at += len(some)
        return found

    def _best(self, row: Row, logits_NV: torch.Tensor, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, K] The tokens to propose at these positions of a row, best first, and their raw confidences."""
        most = self._shape_of(row).top_k
        if self.couples and not row.settings.greedy:
            assert self._race is not None, "bind the drafter first"
            return self._race.arrivals(logits_NV, row.settings, row.key, positions, most)
        logits_NV = logits_NV.float()
        top_NK = torch.topk(logits_NV, min(most, self.vocab_size), dim=-1)
        return top_NK.indices, (top_NK.values - torch.logsumexp(logits_NV, -1, keepdim=True)).exp()

    def _source(self, exits: Sequence[int], n: int) -> str:
        return self.exit_sources[exits[n]] if exits else self.name

    # drawn tokens

    def _drawn(self, rows: Sequence[Row], limits: Sequence[Budget], policy: Policy) -> list[Draft]:
        priced = policy.costs is not None
        entries: list[dict[int, int]] = [{} for _ in rows]
        for row, entry in zip(rows, entries):
            self._rows[row].entry_of = entry

        def read(asked: Asked, drafts: Sequence[Draft], reaches: Reaches) -> DraftOutput:
            some = [rows[b] for b, nodes in asked if nodes == [ROOT]]
            self._read([(row, len(row.ids) - 1) for row, n in zip(some, self._pending(some)) if n > MAY_WAIT])
            batch = [self._entries(rows[b], nodes, drafts[b], entries[b]) for b, nodes in asked]
            some = [rows[b] for b, _ in asked]
            return self._forward.read(
                some, batch, reaches, self.vocab_size, Pricing(policy, alone=True) if priced else None
            )

        pending = self._pending(rows)
        pricing = TreePricing(policy, rows, self._forward.entry, [0 if n > MAY_WAIT else n for n in pending])
        assert self.limits.drawn is not None
        return draw(
            rows, limits, self.limits.drawn, read, self._source, self._forward.entry, pricing if priced else None
        )
