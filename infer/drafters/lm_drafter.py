"""Drafting with a language model of the target's vocabulary: chains, top-k trees, sampled chains and trees.

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
from draftsmith.infer.drafters.draft_model import DraftForward, DraftModel, DraftOutput, DrawnLimits, Limits, Reaches
from draftsmith.infer.drafters.drawn import MAY_WAIT, Asked, draw
from draftsmith.infer.drafters.exit_choice import Pricing
from draftsmith.infer.drafters.tree_builder import Candidate, Expandable, Growth, TreePricing, grow
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


# (row, source, one node's raw confidences, likeliest first) -> probabilities of acceptance.
Calibrated = Callable[[Row, str, list[float]], list[float]]


class LMDrafter:
    """Drafts with `draft`, run by what `make_forward` makes of its model.

    `limits`: of trees of likeliest tokens. `drawn`: of what is drawn for rows with a temperature; None: those get trees
    of likeliest tokens too. `exit_sources`: exit (layers) -> the source that is credited.

    `calibration` and `costs` are what the user gave, for the policy to use.
    """

    features: tuple[str, ...] = ()

    def __init__(
        self,
        name: str,
        draft: DraftModel,
        make_forward: Callable[[Any], DraftForward],
        limits: Limits,
        drawn: DrawnLimits | None,
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
        self.drawn = drawn
        self.draws = drawn is not None
        self.width = limits.width if limits.top_k > 1 else 1
        self.most_rounds, self.least_reach = limits.num_draft_tokens, limits.min_confidence
        self.exit_sources = exit_sources
        self.draft_vocab_size = self.vocab_size = int(config.vocab_size)
        self.max_positions = max_positions(config)
        self.calibration = calibration
        self.costs = costs
        self._draft = draft
        self._make_forward = make_forward
        self._forward = make_forward(draft.model)
        self._assumed: Costs | None = None
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
        chains = self.drawn is not None and self.drawn.top_k == 1 and len(self.exit_sources) == 1
        return self.drawn.depth(False) if self.drawn is not None and chains else 0

    def bind(self, target: Target) -> None:
        check_same_tokenizer(
            self.tokenizer, self.draft_vocab_size, target.tokenizer, target.vocab_size, "the draft model"
        )
        self.vocab_size = min(self.draft_vocab_size, target.vocab_size)
        if target.model is not None and self._draft.follow(target.model):
            self._forward = self._make_forward(self.model)
        self._assumed = self.assumed_costs(target)

    def assumed_costs(self, target: Target) -> Costs | None:
        return self._forward.assumed_costs(target)

    def open(self, rows: Sequence[Row]) -> None:
        self._rows |= {row: _RowState() for row in rows}
        nodes = max(self.limits.nodes, 0 if self.drawn is None else self.drawn.nodes)
        try:
            for row in rows:
                if len(row.ids) < self.max_positions:
                    self.lm.open(row, len(row.ids) + nodes)
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
        return self.drawn is not None and not row.settings.greedy

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
        limits = self.drawn if self.drawn is not None and self._draws(row) else self.limits
        depth = min(limits.depth(priced), budget.depth, max(self.max_positions - len(row.ids), 0))
        if depth < 1 <= budget.depth and not self._rows[row].outgrown:
            self._rows[row].outgrown = True
            log.warning("row %s outgrew the draft model's context of %d: not drafted", row.key, self.max_positions)
        return Budget(min(limits.nodes if limits.top_k > 1 else depth, budget.nodes), depth)

    def _pending(self, rows: Sequence[Row]) -> list[int]:
        """How many tokens of each row, without the newest, the draft has not read."""
        return [len(row.ids) - self.lm.length(row) - 1 for row in rows]

    # the likeliest tokens: a chain or a tree

    def _outright(self, rows: Sequence[Row], limits: Sequence[Budget], policy: Policy) -> list[Draft]:
        growths = [Growth(limit) for limit in limits]
        expansion = self._expansion(rows, limits, growths, policy, policy.calibrated)
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
        assert self.drawn is not None
        return draw(rows, limits, self.drawn, read, self._source, self._forward.entry, pricing if priced else None)


class LMExpansion:
    """A draft model's part in one step's trees: asked for the candidates below some nodes, it runs these nodes in one
    pass. `limits`: of each row; `exits[b]`: (depth, exit) of each node of row b that was run."""

    def __init__(
        self,
        drafter: LMDrafter,
        forward: DraftForward,
        rows: Sequence[Row],
        limits: Sequence[Budget],
        trees: Sequence[Expandable],
        policy: Policy,
        calibrated: Calibrated,
    ) -> None:
        self.limits = limits
        self.exits: list[list[tuple[int, int]]] = [[] for _ in rows]
        self._drafter = drafter
        self._forward = forward
        self._rows = rows
        self._trees = trees
        self._policy = policy
        self._calibrated = calibrated
        self._entries: list[dict[int, int]] = [{} for _ in rows]

    def pricing(self, policy: Policy) -> TreePricing:
        return TreePricing(policy, self._rows, self._forward.entry, self._drafter._pending(self._rows))

    def expand(self, asked: Asked) -> list[list[list[Candidate]]]:
        """The candidates below the asked (row, nodes): ROOT first, parents before their children, and nothing below a
        node that was not asked for."""
        drafter, trees = self._drafter, self._trees
        some = [self._rows[b] for b, _ in asked]
        batch = [drafter._entries(self._rows[b], nodes, trees[b], self._entries[b]) for b, nodes in asked]
        reaches = [[trees[b].reach(node) for node in nodes] for b, nodes in asked]
        pricing = Pricing(self._policy) if self._policy.costs is not None else None
        output = self._forward.read(some, batch, reaches, drafter.vocab_size, pricing)
        left = iter(output.exits)
        for b, nodes in asked if output.exits else ():
            self.exits[b] += [(trees[b].depth(node) + 1, next(left)) for node in nodes]
        return self._candidates(output, some, [len(nodes) for _, nodes in asked])

    def name(self, b: int, nodes: Mapping[int, int]) -> None:
        """The numbers by which row b's verdict will name the nodes that were run; those without one are dropped."""
        named = {nodes[node]: entry for node, entry in self._entries[b].items() if node in nodes}
        self._drafter._rows[self._rows[b]].entry_of = named

    def _candidates(
        self, output: DraftOutput, rows: Sequence[Row], counts: Sequence[int]
    ) -> list[list[list[Candidate]]]:
        """The top-k tokens of each node with their calibrated probabilities."""
        drafter = self._drafter
        logits_NV = output.logits_NV.float()
        top_NK = torch.topk(logits_NV, min(drafter.limits.top_k, drafter.vocab_size), dim=-1)
        probs_NK = (top_NK.values - torch.logsumexp(logits_NV, -1, keepdim=True)).exp().tolist()
        found = []
        owners = [row for row, count in zip(rows, counts) for _ in range(count)]
        for n, (row, tokens, probs) in enumerate(zip(owners, top_NK.indices.tolist(), probs_NK)):
            source = drafter._source(output.exits, n)
            probs = self._calibrated(row, source, probs)
            found.append([Candidate(token, prob, source) for token, prob in zip(tokens, probs)])
        nodes = iter(found)
        return [[next(nodes) for _ in range(count)] for count in counts]
