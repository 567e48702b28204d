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

from draftsmith.infer.contract.distribution import draw_by_inversion
from draftsmith.infer.contract.draft import ROOT, Draft, Group
from draftsmith.infer.contract.protocols import Budget, Feedback, PassTimer, Target, Verdict
from draftsmith.infer.contract.rng import uniform
from draftsmith.infer.contract.row import Row
from draftsmith.infer.costs.account import Account
from draftsmith.infer.costs.pass_costs import Costs
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.drafters.draft_model import DraftForward, DraftModel, DraftOutput, Limits
from draftsmith.infer.drafters.exit_choice import Pricing
from draftsmith.infer.drafters.tree_builder import Candidate, Growth, TreePricing, grow
from draftsmith.infer.models.load import check_same_tokenizer
from draftsmith.infer.models.positions import max_positions
from draftsmith.infer.models.runner.entries import Entries
from draftsmith.infer.models.runner.model_runner import ModelRunner

log = logging.getLogger(__name__)

# A row with more unread tokens than this is read apart; fewer are read with its first node.
MAY_WAIT = 8


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
        limits: Limits,
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
        nodes = self.limits.nodes
        try:
            for row in rows:
                if len(row.ids) < self.max_positions:
                    self.lm.open(row, len(row.ids) + nodes)
        except BaseException:
            self.close(rows)
            raise

    def read(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        ends = [given.start + given.count for given in feedback]
        self._read([(row, end) for row, end in zip(rows, ends) if self._pays or self._draws(row)])

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
        limits = [self._limit(row, budget) for row, budget in zip(rows, budgets)]
        able = [b for b, limit in enumerate(limits) if limit.nodes and limit.depth]
        drawn = [b for b in able if self._draws(rows[b])]
        outright = [b for b in able if b not in drawn]
        policy = self._with_costs(rows, policy)
        for some, make in ((outright, self._outright), (drawn, self._sampled)):
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
        return self.limits.sample and not row.settings.greedy

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

    def _limit(self, row: Row, budget: Budget) -> Budget:
        """The budget, cut to the drafter's own limits and the draft model's context."""
        depth = min(self.limits.num_draft_tokens, budget.depth, max(self.max_positions - len(row.ids), 0))
        if depth < 1 <= budget.depth and not self._rows[row].outgrown:
            self._rows[row].outgrown = True
            log.warning("row %s outgrew the draft model's context of %d: not drafted", row.key, self.max_positions)
        return Budget(
            min(self.limits.nodes, budget.nodes) if self.limits.top_k > 1 else min(depth, budget.nodes), depth
        )

    def _pending(self, rows: Sequence[Row]) -> list[int]:
        """How many tokens of each row, without the newest, the draft has not read."""
        return [len(row.ids) - self.lm.length(row) - 1 for row in rows]

    # the likeliest tokens: a chain or a tree

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
            output = self._forward.read(some, batch, reaches, self.vocab_size, Pricing(policy) if priced else None)
            left = iter(output.exits)
            for b, leaves in asked if output.exits else ():
                exits[b] += [(growths[b].depth(leaf) + 1, next(left)) for leaf in leaves]
            return self._candidates(output, some, [len(leaves) for _, leaves in asked], policy)

        grow(
            growths,
            expand,
            width=self.limits.width if self.limits.top_k > 1 else 1,
            min_reach=self.limits.min_confidence,
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
        self, output: DraftOutput, rows: Sequence[Row], counts: Sequence[int], policy: Policy
    ) -> list[list[list[Candidate]]]:
        """The top-k tokens of each node with their probabilities, calibrated if there is a calibration."""
        logits_NV = output.logits_NV.float()
        top_NK = torch.topk(logits_NV, min(self.limits.top_k, self.vocab_size), dim=-1)
        probs_NK = (top_NK.values - torch.logsumexp(logits_NV, -1, keepdim=True)).exp().tolist()
        found = []
        owners = [row for row, count in zip(rows, counts) for _ in range(count)]
        for n, (row, tokens, probs) in enumerate(zip(owners, top_NK.indices.tolist(), probs_NK)):
            source = self._source(output.exits, n)
            probs = policy.calibrated(row, source, probs)
            found.append([Candidate(token, prob, source) for token, prob in zip(tokens, probs)])
        nodes = iter(found)
        return [[next(nodes) for _ in range(count)] for count in counts]

    def _source(self, exits: Sequence[int], n: int) -> str:
        return self.exit_sources[exits[n]] if exits else self.name

    # drawn tokens: append-only, the structure decided before each draw

    def _sampled(self, rows: Sequence[Row], limits: Sequence[Budget], policy: Policy) -> list[Draft]:
        priced = policy.costs is not None
        pricing = TreePricing(policy, rows, self._forward.entry, self._pending(rows))
        accounts = [policy.alone(row) if priced else None for row in rows]
        drafts = [Draft() for _ in rows]
        reaches: list[dict[int, float]] = [{ROOT: 1.0} for _ in rows]
        frontier = [[ROOT] for _ in rows]
        for row in rows:
            self._rows[row].entry_of = {}
        for depth in range(max(limit.depth for limit in limits)):
            asked = [(b, frontier[b]) for b in range(len(rows)) if frontier[b] and depth < limits[b].depth]
            if priced:  # these nodes are drawn already: choosing among them keeps the distribution
                asked = pricing.drawn_worth_reading(asked, lambda b, node: reaches[b][node], depth == 0)
            if not asked:
                break
            entry_of = [self._rows[row].entry_of for row in rows]
            batch = [self._entries(rows[b], nodes, drafts[b], entry_of[b]) for b, nodes in asked]
            given = [[reaches[b][node] for node in nodes] for b, nodes in asked]
            some = [rows[b] for b, _ in asked]
            output = self._forward.read(
                some, batch, given, self.vocab_size, Pricing(policy, alone=True) if priced else None
            )
            frontier = [[] for _ in rows]
            at = 0
            for b, nodes in asked:
                logits_QV = output.logits_NV[at : at + len(nodes)]
                exits = output.exits[at : at + len(nodes)]
                at += len(nodes)
                drafts[b].exits += [(depth + 1, exit) for exit in exits]
                frontier[b] = self._draw(
                    rows[b], drafts[b], nodes, logits_QV, exits, limits[b], reaches[b], accounts[b]
                )
        return drafts

    def _draw(
        self,
        row: Row,
        draft: Draft,
        frontier: list[int],
        logits_QV: torch.Tensor,
        exits: Sequence[int],
        limit: Budget,
        reaches: dict[int, float],
        account: Account | None,
    ) -> list[int]:
        """Draw the children of each frontier node; returns the distinct new nodes, in order.

        How many to draw is decided before drawing, from the nodes drawn so far.
        """
        made: list[int] = []
        for q, parent in enumerate(frontier):
            count = min(self._slots(reaches[parent], len(draft), account), limit.nodes - len(draft))
            source = self._source(exits, q)
            distribution_V = self._distribution(row, logits_QV[q])
            group = Group(distribution_V, with_replacement=self.limits.replacement)
            left_V = distribution_V
            for i in range(count):
                if not self.limits.replacement and i and not float(left_V.sum()) > 0:
                    break
                number = (parent + 1) * self.limits.top_k + i
                position = len(row.ids) + (0 if parent == ROOT else draft.depths[parent])
                level = uniform(row.settings.seed, row.key, position, "draft", number)
                token = draw_by_inversion(left_V, level)
                known = draft.child(parent, token)
                confidence = float(left_V[token] / left_V.sum())
                node = draft.sampled(parent, token, group, source, confidence)
                if known is None:
                    made.append(node)
                    accepted = confidence if account is None else account.drawn_acceptance(i)
                    reaches[node] = reaches[parent] * accepted
                if not self.limits.replacement:
                    left_V = left_V.clone()
                    left_V[token] = 0.0
        return made

    def _slots(self, reach: float, nodes: int, account: Account | None) -> int:
        """How many children to draw below a node: as long as one more is worth verifying. Each is assumed to be
        accepted as often as the mean, if those before it were not; its token plays no part."""
        if account is None:
            return self.limits.top_k
        found, count = account.found, 0
        left = reach * found
        while count < self.limits.top_k and left * account.seconds_per_token > account.next_node(nodes + count):
            left *= 1 - found
            count += 1
        return count

    def _distribution(self, row: Row, logits_V: torch.Tensor) -> torch.Tensor:
        """[V] the draft's distribution at a node, after the row's temperature and truncation, float64."""
        scores_1V = logits_V[None].float()
        for warper in row.settings.warpers():
            scores_1V = warper(None, scores_1V)
        return torch.softmax(scores_1V[0].double(), -1)
