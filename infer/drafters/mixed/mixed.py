"""Several drafters as one: their candidates are merged into one tree per row, under one budget.

Retrieving drafters propose first, which takes next to no time. Then each draft model is asked for candidates below the
leaves where the tree so far leaves the most to be found, its own or another source's: as long as a pass pays, or
without costs within its own limits. A node's probability is pooled from all sources that have candidates there
(pool.py), after those of retrieving drafters were corrected by what became of earlier ones (infer/costs/rates.py).
RASD (arXiv 2503.03434) and Graft (2605.20104) merge such trees too; neither prices nodes.

All candidates are outright, at every temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from draftsmith.infer.contract.draft import ROOT, Draft, Trial
from draftsmith.infer.contract.protocols import (
    Budget,
    DocumentLearner,
    Drafter,
    Feedback,
    LearnsAnswers,
    PassTimer,
    Target,
    Verdict,
    couples,
    drafts_unread,
)
from draftsmith.infer.contract.row import Row
from draftsmith.infer.contract.trace import Tried
from draftsmith.infer.costs.calibration import band_of
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.costs.rates import Rates
from draftsmith.infer.drafters.mixed.merged_tree import MergedTree
from draftsmith.infer.drafters.mixed.pool import Pool
from draftsmith.infer.drafters.mixed.source_measurements import SourceMeasurements
from draftsmith.infer.drafters.tree_builder import Expands, Expansion, TreePricing

# What a drafter of candidates without a draft model proposes is merged as a whole.
Proposed = dict[int, Draft]


@dataclass(slots=True)
class _Learned:
    """What a band of temperatures has taught: the pool's weights, and the acceptance rates of proposed candidates."""

    pool: Pool
    rates: Rates = field(default_factory=Rates)


@dataclass(slots=True)
class _Drafted:
    """A row's tree, and by number of the drafter that proposed it the whole draft of each."""

    tree: MergedTree
    proposed: Proposed

    def own_verdicts(self, verdict: Verdict) -> dict[int, Verdict]:
        """By the same number, `verdict` in the numbers of each draft."""
        return {number: own_verdict(draft, verdict) for number, draft in self.proposed.items()}


class Mixed:
    """Merges the drafts of several drafters.

    Args:
        drafters: at least two, of different names; each may have its own arguments, calibration and costs.
        nodes: the most nodes of a tree; 0 leaves room for all that its drafters would draft.
        min_confidence: leave out nodes whose path is less probable than this.
    """

    def __init__(self, drafters: Sequence[Drafter], nodes: int = 0, min_confidence: float = 0.0) -> None:
        if nodes < 0:
            raise ValueError(f"nodes must be at least 1, or 0 for no limit of the mix's own, not {nodes}")
        if not 0 <= min_confidence < 1:
            raise ValueError(f"min_confidence must be at least 0 and below 1, not {min_confidence}")
        self.drafters = _checked(drafters)
        self.name = "+".join(drafter.name for drafter in self.drafters)
        self.origin = ""
        self.nodes = nodes
        self.min_confidence = min_confidence
        self.features = self._features()
        self._asked = {number: one for number, one in enumerate(self.drafters) if isinstance(one, Expands)}
        self._proposing = {number: one for number, one in enumerate(self.drafters) if number not in self._asked}
        self._measured = SourceMeasurements({}, None)
        self._learned: dict[str, _Learned] = {}
        self._drafted: dict[Row, _Drafted] = {}
        self._vocab_size = 0
        learners = [drafter for drafter in self.drafters if isinstance(drafter, DocumentLearner)]
        if learners:  # what cannot learn documents has no such method
            self.add_document: Callable[[Sequence[int]], None] = lambda ids: _teach(learners, ids)
        answered = [drafter for drafter in self.drafters if isinstance(drafter, LearnsAnswers)]
        if answered:
            self.learns = any(drafter.learns for drafter in answered)
            # Where none was asked to learn, a replay of arriving answers teaches them all.
            taught = [drafter for drafter in answered if drafter.learns] or answered
            self.add_answer: Callable[[Row], None] = lambda row: _teach_answer(taught, row)

    @property
    def forward_seconds(self) -> float:
        return sum(drafter.forward_seconds for drafter in self.drafters)

    @property
    def bytes_moved(self) -> int:
        return sum(drafter.bytes_moved for drafter in self.drafters)

    @property
    def couples(self) -> bool:
        """Whether any of its drafters does (infer/drafters/lm_drafter.py)."""
        return any(map(couples, self.drafters))

    @property
    def drafts_unread(self) -> bool:
        """Whether all its drafters propose before the end of a prompt is read."""
        return all(map(drafts_unread, self.drafters))

    @property
    def calibration(self) -> str:
        """Each source's own calibration enters before its candidates are pooled, so the policy has none to use."""
        return "none"

    @property
    def costs(self) -> Any:
        """Those of all its draft models; none if one of them has none."""
        return self._measured.costs or "none"

    def pass_timers(self) -> dict[str, PassTimer]:
        return {name: timer for drafter in self.drafters for name, timer in drafter.pass_timers().items()}

    # rows

    def bind(self, target: Target) -> None:
        for drafter in self.drafters:
            drafter.bind(target)
        self.features = self._features()
        self._vocab_size = target.vocab_size
        self._measured = SourceMeasurements.of(self.drafters, target)

    def _features(self) -> tuple[str, ...]:
        """Those of all its drafters. Some know theirs once they are bound."""
        return tuple(dict.fromkeys(name for drafter in self.drafters for name in drafter.features))

    def open(self, rows: Sequence[Row]) -> None:
        opened: list[Drafter] = []
        try:
            for drafter in self.drafters:
                drafter.open(rows)
                opened.append(drafter)
        except BaseException:
            for drafter in opened:
                drafter.close(rows)
            raise

    def read(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        for drafter in self.drafters:
            drafter.read(rows, feedback)

    def abandon(self, rows: Sequence[Row]) -> None:
        self._forget(rows)
        for drafter in self.drafters:
            drafter.abandon(rows)

    def close(self, rows: Sequence[Row]) -> None:
        self._forget(rows)
        for drafter in self.drafters:
            drafter.close(rows)

    def _forget(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._drafted.pop(row, None)

    # a step

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget], policy: Policy | None = None) -> list[Draft]:
        trees = [MergedTree(self._band(row).pool) for row in rows]
        proposed: list[Proposed] = [{} for _ in rows]
        for number, drafter in self._proposing.items():
            for b, draft in enumerate(drafter.propose(rows, budgets)):
                _check(drafter, draft, budgets[b], self._vocab_size)
                proposed[b][number] = draft
        for row, tree, drafts in zip(rows, trees, proposed):
            tree.graft([(number, draft, self._corrected(row, number, draft)) for number, draft in drafts.items()])
        expansions: dict[int, Expansion] = {}
        for number, model in self._asked.items():
            self._expect(number, rows, policy)
            calibrated = self._measured.calibrated(number)
            expansions[number] = model.expansion(rows, budgets, trees, policy, calibrated)
        for b, (tree, budget) in enumerate(zip(trees, budgets)):
            room = sum(map(len, proposed[b].values())) + sum(one.limits[b].nodes for one in expansions.values())
            tree.room = min(room, budget.nodes, self.nodes or room)
        for number, model in self._asked.items():
            self._expect(number, rows, policy)
            self._expand(number, model, expansions[number], rows, budgets, trees, policy)
        if policy is not None and policy.costs is not None:
            self._cut(rows, trees, policy)
        merged = []
        for b, (row, tree) in enumerate(zip(rows, trees)):
            draft, nodes = tree.draft(self.min_confidence)
            for expansion in expansions.values():
                expansion.name(b, nodes)
                draft.exits += expansion.exits[b]
            self._drafted[row] = _Drafted(tree, proposed[b])
            merged.append(draft)
        return merged

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        drafted = [self._drafted.pop(row) for row in rows]
        own = [one.own_verdicts(verdict) for one, verdict in zip(drafted, verdicts)]
        for number, drafter in enumerate(self.drafters):
            drafter.observe(rows, [known.get(number, verdict) for known, verdict in zip(own, verdicts)], feedback)
        bands = {band_of(row.settings.temperature): self._band(row) for row in rows}
        for learned in bands.values():
            learned.rates.next_step()
        for row, one, verdict, found in zip(rows, drafted, verdicts, own):
            one.tree.grade(verdict.committed)
            for number, draft in one.proposed.items():
                known = self._measured.calibration(number, row)
                curves = () if known is None else list(known.curves)
                self._band(row).rates.observe(draft, found[number], curves)
        for learned in bands.values():
            learned.pool.refit()

    def _expect(self, number: int, rows: Sequence[Row], policy: Policy | None) -> None:
        """Account for this draft model as if it drafted alone, by what was measured of it."""
        if policy is not None:
            policy.expect(rows, number in self._measured.coupled, self._measured.calibrations.get(number))

    def _expand(
        self,
        number: int,
        model: Expands,
        expansion: Expansion,
        rows: Sequence[Row],
        budgets: Sequence[Budget],
        trees: Sequence[MergedTree],
        policy: Policy | None,
    ) -> None:
        """Ask one draft model, in rounds of a pass over all rows."""
        priced = policy is not None and policy.costs is not None
        pricing: TreePricing | None = expansion.pricing(policy) if policy is not None and priced else None
        depths = [
            min(limit.depth, model.max_depth, model.max_positions - len(row.ids)) for row, limit in zip(rows, budgets)
        ]
        going = [b for b, limit in enumerate(expansion.limits) if limit.nodes and limit.depth]
        least = 0.0 if priced else model.least_reach
        for rounds in range(model.most_rounds):
            first = not rounds
            going = [b for b in going if rounds < expansion.limits[b].depth]
            # The first pass may take leaves of other sources together with the root.
            width = model.width + first
            asked = [(b, trees[b].wanted(number, depths[b], width, least)) for b in going]
            asked = [(b, leaves) for b, leaves in asked if leaves]
            if pricing is not None:
                asked = pricing.worth_reading(asked, lambda b, leaf: trees[b].worth(leaf), first)
            asked = [(b, trees[b].with_ancestors(number, leaves)) for b, leaves in asked]
            if not asked:
                return
            if first:  # nothing can be read below a root that was not
                going = [b for b, _ in asked]
            for (b, leaves), found in zip(asked, expansion.expand(asked)):
                trees[b].asked[number].update(leaves)
                for leaf, candidates in zip(leaves, found):
                    trees[b].add(number, leaf, candidates)

    def _cut(self, rows: Sequence[Row], trees: Sequence[MergedTree], policy: Policy) -> None:
        """Leave room only for the leaves that are worth verifying, and record what draft models promised of them."""
        counts = policy.width({row: [tree.reach(leaf) for leaf in tree.kept()] for row, tree in zip(rows, trees)})
        promised, expanded = 0.0, 0
        for row, tree in zip(rows, trees):
            tree.room = counts[row]
            for leaf in tree.kept():
                if any(number in self._asked for number in tree.named[leaf]):
                    promised += tree.confidences[leaf]
            expanded += sum(map(len, tree.asked.values()))
        policy.joint.covered(promised / expanded if expanded else None)

    def _corrected(self, row: Row, number: int, draft: Draft) -> list[float]:
        """The probability of each node, given its parent: calibrated, and corrected by earlier outcomes."""
        known, rates = self._measured.calibration(number, row), self._band(row).rates
        found = [0.0] * len(draft)
        for trials in draft.trials.values():
            for rank, (node, _, source, confidence) in enumerate(trials):
                measured = None
                if known is not None and source in known.curves:
                    measured = known.of(source, rank)(confidence)
                found[node] = rates.corrected(source, rank, confidence, measured)
        return found

    def _band(self, row: Row) -> _Learned:
        band = band_of(row.settings.temperature)
        if band not in self._learned:
            self._learned[band] = _Learned(Pool(len(self.drafters)))
        return self._learned[band]


def own_verdict(draft: Draft, verdict: Verdict) -> Verdict:
    """`verdict` in the numbers of a draft that was merged into the one it belongs to: as far as that draft has the
    committed tokens, and with all of its trials that they reached."""
    path: list[int] = []
    accepted: list[Trial] = []
    tried: list[Tried] = []
    at = ROOT
    for depth, token in enumerate(verdict.committed, start=1):
        right = [trial for trial in draft.trials.get(at, ()) if draft.tokens[trial.node] == token]
        for trial in draft.trials.get(at, ()):
            tried.append(Tried(depth, trial.source, trial.confidence, trial in right))
        if not right or depth == len(verdict.committed):
            break
        at = right[0].node
        path.append(at)
        accepted.append(right[0])
    return replace(verdict, path=path, accepted=accepted, tried=tried)


def _checked(drafters: Sequence[Drafter]) -> list[Drafter]:
    """ValueError unless these drafters can be mixed."""
    if len(drafters) < 2:
        raise ValueError(f"a mix needs at least two drafters, and got {len(drafters)}")
    names: set[str] = set()
    for drafter in drafters:
        if isinstance(drafter, Mixed):
            raise ValueError(f"a mix cannot hold another mix ({drafter.name}): list all drafters in one")
        if drafter.name in names:
            raise ValueError(f"a mix cannot hold two drafters named {drafter.name!r}")
        if isinstance(drafter, Expands):
            drafter.join_mix()
        names.add(drafter.name)
    passes = [name for drafter in drafters for name in drafter.pass_timers()]
    if len(set(passes)) < len(passes):
        raise ValueError(f"a mix cannot hold two draft models whose passes have one name, as {', '.join(passes)}")
    return list(drafters)


def _check(drafter: Drafter, draft: Draft, budget: Budget, vocab_size: int) -> None:
    """ValueError unless this proposal can be merged."""
    try:
        draft.check(vocab_size)
    except ValueError as problem:
        raise ValueError(f"{drafter.name}: {problem}") from problem
    if draft.depth > budget.depth:
        raise ValueError(f"{drafter.name} proposed a draft of depth {draft.depth}, and its budget is {budget.depth}")
    if draft.probes:
        raise ValueError(f"{drafter.name} scores probes, so it cannot be part of a mix")
    if any(not trial.group.outright for trials in draft.trials.values() for trial in trials):
        raise ValueError(f"{drafter.name} draws its tokens, so it cannot be part of a mix")


def _teach(learners: Sequence[DocumentLearner], ids: Sequence[int]) -> None:
    for drafter in learners:
        drafter.add_document(ids)


def _teach_answer(learners: Sequence[LearnsAnswers], row: Row) -> None:
    for drafter in learners:
        drafter.add_answer(row)
