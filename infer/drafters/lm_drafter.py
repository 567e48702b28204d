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
from functools import partial
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
from draftsmith.infer.drafters.lm_expansion import Calibrated, LMExpansion
from draftsmith.infer.drafters.tree_builder import Expandable, Growth, TreePricing, grow
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
        self.width = limits.likeliest.width if limits.likeliest.top_k > 1 else 1
        self.most_rounds = (limits.coupled or limits.likeliest).num_draft_tokens
        self._in_a_mix = False
        self.least_reach = limits.likeliest.min_confidence
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

    def pass_timers(self) -> dict[str, PassTimer]:
        return self._forward.pass_timers()

    @property
    def drawn_chain(self) -> int:
        """The length of the chains that it draws for a row with a temperature, without costs; 0 if it draws none, or
        trees, or chooses an exit for each node."""
        drawn = self.limits.drawn if self.draws else None
        chains = drawn is not None and drawn.top_k == 1 and len(self.exit_sources) == 1
        return drawn.depth(False) if drawn is not None and chains else 0

    @property
    def couples(self) -> bool:
        """Whether its drafts for rows with a temperature share the noise of the target's own draws. They fit texts that
        were drawn with this noise, and no others."""
        return self.limits.coupled is not None and not self.draws

    @property
    def may_couple(self) -> bool:
        """Whether its drafts do so alone or in a mix: calibrations are measured for that."""
        return self.limits.coupled is not None

    @property
    def draws(self) -> bool:
        """Whether it draws for rows with a temperature."""
        return self.limits.drawn is not None and not self._in_a_mix

    def join_mix(self) -> None:
        """From now on all its candidates are outright; ValueError if the user asked for drawn ones."""
        if self.limits.coupled is None and self.limits.drawn is not None:
            raise ValueError(f"a mix cannot draw its tokens: leave out sample=drawn of {self.name}")
        self._in_a_mix = True

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
        return self.draws and not row.settings.greedy

    def _limits_of(self, row: Row) -> Limits | DrawnLimits:
        limits = self.limits
        if row.settings.greedy:
            return limits.likeliest
        drawn = limits.drawn if self.draws else None
        return drawn or limits.coupled or limits.likeliest

    def _catch_up(self, rows: Sequence[Row], policy: Policy) -> None:
        """Read what the draft has not read of the rows for which drafting would pay if it had read them.

        A draft that does not pay need not read at all. Reading serves all later steps, so it is weighed against what
        drafting gains in all the steps that a row may still take.
        """
        behind = {row: pending for row, pending in zip(rows, self._pending(rows)) if pending > MAY_WAIT}
        paying = len(rows)
        if policy.costs is not None:
            account, entry = policy.joint, self._forward.entry
            coverage = account.coverage * account.trust
            paying = account.expand([(1.0, row) for row in rows], {}, entry, coverage)
            behind = {row: pending for row, pending in behind.items() if row in set(rows[:paying])}
            if not account.reading_pays(behind, {row: row.left for row in behind}, entry, coverage):
                behind = {}
            # Rows that join are read with their prompts if reading all of such rows pays.
            whole = {row: row.prompt_tokens for row in rows}
            self._pays = account.reading_pays(whole, {row: row.stops.max_new_tokens for row in rows}, entry, coverage)
        self._read([(row, len(row.ids) - 1) for row in behind])

    def _with_costs(self, rows: Sequence[Row], policy: Policy | None) -> Policy:
        """`policy`; if it has no costs and this draft needs some, one that has no past."""
        if (policy is None or policy.costs is None) and self._assumed is not None:
            policy = Policy(self._assumed, policy.calibrations if policy is not None else None)
            policy.begin(rows)
        return policy or Policy()

    def _limit(self, row: Row, budget: Budget, priced: bool) -> Budget:
        """The budget, cut to the drafter's own limits and the draft model's context."""
        limits = self._limits_of(row)
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
        growths = [Growth(limit) for limit in limits]
        policy.expect(rows, self.couples)
        expansion = self._expansion(rows, limits, growths, policy, partial(policy.calibrated, coupled=self.couples))
        grow(
            growths,
            expansion.expand,
            width=self.width,
            min_reach=self.least_reach,
            pricing=expansion.pricing(policy) if policy.costs is not None else None,
        )
        drafts = []
        for b, growth in enumerate(growths):
            draft, nodes = growth.draft()
            draft.exits = expansion.exits[b]
            expansion.name(b, nodes)
            drafts.append(draft)
        return drafts

    def expansion(
        self,
        rows: Sequence[Row],
        budgets: Sequence[Budget],
        trees: Sequence[Expandable],
        policy: Policy | None,
        calibrated: Calibrated,
    ) -> LMExpansion:
        """This draft model's part in trees that others build; for rows without a limit it has none."""
        limits = [self._limit(row, budget, priced=False) for row, budget in zip(rows, budgets)]
        for row in rows:
            self._rows[row].entry_of = {}
        return self._expansion(rows, limits, trees, self._with_costs(rows, policy), calibrated)

    def _expansion(
        self,
        rows: Sequence[Row],
        limits: Sequence[Budget],
        trees: Sequence[Expandable],
        policy: Policy,
        calibrated: Calibrated,
    ) -> LMExpansion:
        able = [row for row, limit in zip(rows, limits) if limit.nodes and limit.depth]
        if able:
            self._catch_up(able, policy)
        return LMExpansion(self, self._forward, rows, limits, trees, policy, calibrated)

    def _entries(self, row: Row, nodes: list[int], tree: Draft | Expandable, entry_of: dict[int, int]) -> Entries:
        """What to run: the pending tokens with the ROOT, which comes first, and nodes below their parents' entries."""
        state = self._rows[row]
        run = Entries([], [])
        if nodes[:1] == [ROOT]:
            run = Entries.chain(row.ids[self.lm.length(row) :])
            state.pending, nodes = len(run.tokens), nodes[1:]
        if nodes:
            tokens, parents = tree.tokens, tree.parents
            first = self.lm.uncommitted(row) + len(run.tokens)
            entry_of.update({node: first + i for i, node in enumerate(nodes)})
            run.parents += [state.pending - 1 if parents[node] == ROOT else entry_of[parents[node]] for node in nodes]
            run.tokens += [tokens[node] for node in nodes]
        return run

    def best(self, row: Row, logits_NV: torch.Tensor, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, K] The tokens to propose at these positions of a row, best first, and their raw confidences."""
        most = self._limits_of(row).top_k
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

        pricing_of_exits = Pricing(policy, alone=True, coupled=self.may_couple)

        def read(asked: Asked, drafts: Sequence[Draft], reaches: Reaches) -> DraftOutput:
            some = [rows[b] for b, nodes in asked if nodes == [ROOT]]
            self._read([(row, len(row.ids) - 1) for row, n in zip(some, self._pending(some)) if n > MAY_WAIT])
            batch = [self._entries(rows[b], nodes, drafts[b], entries[b]) for b, nodes in asked]
            some = [rows[b] for b, _ in asked]
            return self._forward.read(some, batch, reaches, self.vocab_size, pricing_of_exits if priced else None)

        pending = self._pending(rows)
        pricing = TreePricing(policy, rows, self._forward.entry, [0 if n > MAY_WAIT else n for n in pending])
        assert self.limits.drawn is not None
        return draw(
            rows, limits, self.limits.drawn, read, self._source, self._forward.entry, pricing if priced else None
        )
