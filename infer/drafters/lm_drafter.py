"""Drafting with a model of the target's language: chains and trees of likeliest, coupled or drawn tokens.

Classic speculative sampling (arXiv 2211.17192) drafts one chain; sampled trees follow SpecInfer (2305.09781, with
replacement) and Sequoia (2402.12374, without). How the model reads a row is its reader's (draft_reader.py): SmallLM and
SD2 build an LMDrafter that reads text, heads (heads/) one that reads the target's states.

Legend: B rows, Q queries, N nodes, V vocabulary, K candidates.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.protocols import Budget, Feedback, PassTimer, Target, Verdict
from draftsmith.infer.contract.row import Row
from draftsmith.infer.costs.pass_costs import Costs
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.drafters.coupled import Race
from draftsmith.infer.drafters.draft_model import DraftLimits, DrawnLimits, Limits, Reaches
from draftsmith.infer.drafters.draft_reader import DraftOutput, DraftReader, TextReader
from draftsmith.infer.drafters.drawn import MAY_WAIT, Asked, draw
from draftsmith.infer.drafters.exit_choice import Pricing
from draftsmith.infer.drafters.heads.learned_rates import LearnedRates
from draftsmith.infer.drafters.lm_expansion import Calibrated, LMExpansion
from draftsmith.infer.drafters.tree_builder import Expandable, Growth, TreePricing, grow

log = logging.getLogger(__name__)


class LMDrafter:
    """Drafts what `reader` makes of its rows.

    `exit_sources`: exit (layers) -> the source that is credited; `depth_sources`: those that a reader names by depth.

    `calibration` and `costs` are what the user gave, for the policy to use.
    """

    def __init__(
        self,
        name: str,
        reader: DraftReader,
        limits: DraftLimits,
        exit_sources: Mapping[int, str],
        calibration: Any,
        costs: Any,
    ) -> None:
        self.name = name
        self.reader = reader
        self.origin = reader.origin
        self.features = reader.features
        self.limits = limits
        self.width = limits.likeliest.width if limits.likeliest.top_k > 1 else 1
        self.most_rounds = (limits.coupled or limits.likeliest).num_draft_tokens
        self._in_a_mix = False
        self.least_reach = limits.likeliest.min_confidence
        self.exit_sources = exit_sources
        self.max_positions = reader.max_positions
        self.max_depth = reader.max_depth
        self.at_once = reader.at_once
        self.depth_sources = reader.depth_sources
        # What each depth's candidates are worth, where no calibration was measured: they do not depend on the path.
        self._learned = LearnedRates() if reader.at_once else None
        if isinstance(reader, TextReader):  # it can read a whole text in one pass (LeavesEarly)
            self.model = reader.model
        self.calibration = calibration
        self.costs = costs
        self._assumed: Costs | None = None
        self._race: Race | None = None
        # Rows that have outgrown the draft model's context.
        self._outgrown: set[Row] = set()
        # Whether the last outright drafts paid. If not, prompts are left unread until one does.
        self._pays = True

    @property
    def forward_seconds(self) -> float:
        return self.reader.forward_seconds

    @property
    def bytes_moved(self) -> int:
        return self.reader.bytes_moved

    def pass_timers(self) -> dict[str, PassTimer]:
        return self.reader.pass_timers()

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

    @contextmanager
    def outright(self) -> Iterator[None]:
        """Inside, all its candidates are outright, as in a mix."""
        before, self._in_a_mix = self._in_a_mix, True
        try:
            yield
        finally:
            self._in_a_mix = before

    def join_mix(self) -> None:
        """From now on all its candidates are outright; ValueError if the user asked for drawn ones."""
        if self.limits.coupled is None and self.limits.drawn is not None:
            raise ValueError(f"a mix cannot draw its tokens: leave out sample=drawn of {self.name}")
        self._in_a_mix = True

    def bind(self, target: Target) -> None:
        self.reader.bind(target)
        self.origin, self.features = self.reader.origin, self.reader.features
        self.max_positions = self.reader.max_positions
        if isinstance(self.reader, TextReader):
            self.model = self.reader.model
        self._assumed = self.assumed_costs(target)
        self._race = Race.of(target)

    def assumed_costs(self, target: Target) -> Costs | None:
        return self.reader.assumed_costs(target)

    def open(self, rows: Sequence[Row]) -> None:
        try:
            for row in rows:
                self.reader.open(row, self.limits.nodes)
        except BaseException:
            self.close(rows)
            raise

    def read(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        self.reader.take(rows, feedback)
        ends = [given.start + given.count for given in feedback]
        # Rows that draw are read when their own account first drafts: `_pays` depends on other rows too.
        self.reader.read([(row, end) for row, end in zip(rows, ends) if self._pays and not self._draws(row)])

    def abandon(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.reader.abandon(row)

    def close(self, rows: Sequence[Row]) -> None:
        if self._learned is not None:
            self._learned.close(rows)
        for row in rows:
            self.reader.close(row)
            self._outgrown.discard(row)

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
        self.reader.keep(rows, verdicts, feedback)
        if self._learned is not None:
            self._learned.observe(rows, self.couples)

    def _draws(self, row: Row) -> bool:
        return self.draws and not row.settings.greedy

    def _limits_of(self, row: Row) -> Limits | DrawnLimits:
        limits = self.limits
        if row.settings.greedy:
            return limits.likeliest
        drawn = limits.drawn if self.draws else None
        return drawn or limits.coupled or limits.likeliest

    def _catch_up(self, rows: Sequence[Row], policy: Policy) -> list[Row]:
        """The rows for which drafting pays, once what the draft has not read of them is read; reads what is worth it.

        A draft that does not pay need not read at all. Reading serves all later steps, so it is weighed against what
        drafting gains in all the steps that a row may still take.
        """
        paying = list(rows)
        behind = {row: pending for row, pending in zip(rows, self.pending(rows)) if pending > MAY_WAIT}
        if policy.costs is not None:
            account, entry = policy.joint, self.reader.entry
            coverage, at_once = account.coverage * account.trust, self.reader.at_once
            found = account.first_gain([(1.0, row) for row in rows], {}, entry, coverage, at_once=at_once)
            paying = paying[: found.offers]
            behind = {row: pending for row, pending in behind.items() if row in set(paying)}
            reading = self.reader.reading
            if not account.reading_pays(found, behind, {row: row.left for row in behind}, reading):
                behind = {}
            # Rows that join are read with their prompts if reading all of such rows pays.
            whole = {row: row.prompt_tokens for row in rows}
            left = {row: row.stops.max_new_tokens for row in rows}
            self._pays = account.reading_pays(found, whole, left, reading)
        self.reader.read([(row, len(row.ids) - 1) for row in behind])
        return paying

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
        if depth < 1 <= budget.depth and row not in self._outgrown:
            self._outgrown.add(row)
            log.warning("row %s outgrew the draft model's context of %d: not drafted", row.key, self.max_positions)
        if depth and not self.reader.can_draft(row):
            return Budget(0, 0)
        return Budget(min(limits.nodes if limits.top_k > 1 else depth, budget.nodes), depth)

    def pending(self, rows: Sequence[Row]) -> list[int]:
        """How many tokens of each row are read with its first node, besides those that always are."""
        return [self.reader.unread(row) for row in rows]

    # outright candidates, likeliest or coupled: a chain or a tree

    def _outright(self, rows: Sequence[Row], limits: Sequence[Budget], policy: Policy) -> list[Draft]:
        growths = [Growth(limit) for limit in limits]
        policy.expect(rows, self.couples)
        calibrated: Calibrated = partial(policy.calibrated, coupled=self.couples)
        learned = self._learned
        if learned is not None:
            learned.begin(rows)
            calibrated = partial(learned.corrected, policy, coupled=self.couples)
        self.reader.begin(rows)
        paying = set(self._catch_up(rows, policy))
        for row, growth in zip(rows, growths):
            if row not in paying:
                growth.budget = Budget(0, 0)
        expansion = LMExpansion(self, rows, limits, growths, policy, calibrated, learned)
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
        policy = self._with_costs(rows, policy)
        able = [row for row, limit in zip(rows, limits) if limit.nodes and limit.depth]
        self.reader.begin(rows)
        if able:
            self._catch_up(able, policy)
        return LMExpansion(self, rows, limits, trees, policy, calibrated)

    def best(
        self, row: Row, output: DraftOutput, start: int, positions: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, K] The tokens to propose at these positions of a row, whose nodes come from `start` on, best first, and
        their raw confidences."""
        most, end = self._limits_of(row).top_k, start + len(positions)
        if not self.couples or row.settings.greedy:
            return output.best(start, end, most)
        assert self._race is not None, "bind the drafter first"
        logits_NV = output.over(self.reader.vocab_size)[start:end]
        return self._race.arrivals(logits_NV, row.settings, row.key, positions, most)

    def source(self, output: DraftOutput, n: int) -> str:
        """The source of node n's candidates."""
        if output.sources:
            return output.sources[n]
        return self.exit_sources[output.exits[n]] if output.exits else self.name

    # drawn tokens

    def _drawn(self, rows: Sequence[Row], limits: Sequence[Budget], policy: Policy) -> list[Draft]:
        priced = policy.costs is not None
        reader = self.reader
        reader.begin(rows)
        pricing_of_exits = Pricing(policy, alone=True, coupled=self.may_couple)

        def read(asked: Asked, drafts: Sequence[Draft], reaches: Reaches) -> DraftOutput:
            some = [rows[b] for b, nodes in asked if nodes == [ROOT]]
            reader.read([(row, len(row.ids) - 1) for row, n in zip(some, self.pending(some)) if n > MAY_WAIT])
            asked_rows, trees = [rows[b] for b, _ in asked], [drafts[b] for b, _ in asked]
            nodes = [some for _, some in asked]
            output = reader.run(asked_rows, nodes, trees, reaches, pricing_of_exits if priced else None)
            return DraftOutput(output.over(reader.vocab_size), output.exits, sources=output.sources)

        pending = self.pending(rows)
        if priced:
            limits = [
                limit if n <= MAY_WAIT or self._reading_pays(row, n, policy) else Budget(0, 0)
                for row, limit, n in zip(rows, limits, pending)
            ]
        waiting = [0 if n > MAY_WAIT else n for n in pending]
        pricing = TreePricing(policy, rows, reader.entry, waiting, reader.at_once)
        assert self.limits.drawn is not None
        return draw(rows, limits, self.limits.drawn, read, self.source, reader.entry, pricing if priced else None)

    def _reading_pays(self, row: Row, unread: int, policy: Policy) -> bool:
        """Whether a row that draws is to be read: what all its drafts gain, by its own account, against reading."""
        account = policy.alone(row)
        found = account.first_gain([(1.0, row)], {}, self.reader.entry, account.found)
        return account.reading_pays(found, {row: unread}, {row: row.left}, self.reader.reading)
