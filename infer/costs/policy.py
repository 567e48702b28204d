"""The policy: how much to draft and to verify, for every drafter, from calibrated confidence and measured seconds.

One per engine. Three kinds of work are weighed (infer/costs/account.py): one more pass of the draft over more nodes, a
deeper block for some of them (infer/drafters/exit_choice.py), and one more node to verify. Passes are packed, so each
row gets its own number of nodes: the best of all rows' nodes are verified until the next one does not pay. Without
costs nothing is limited; without a calibration, confidence stays raw.

Drafters that build their tree with the policy (infer/drafters/tree_builder.py) are cut while they draft. All others
propose, and `cut` cuts: their confidences are calibrated, and corrected by what became of earlier ones
(infer/costs/rates.py). Drawn drafts cannot be cut. How much is drawn depends on an account of that row alone, as if
every pass were shared by `batch_size` rows like it; otherwise its text would depend on the rows beside it, and on what
ran before.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.protocols import Budget, Drafter, Target, Verdict
from draftsmith.infer.contract.row import Row
from draftsmith.infer.costs.acceptance import concentration
from draftsmith.infer.costs.account import DISPLACED, Account
from draftsmith.infer.costs.asking import Asking
from draftsmith.infer.costs.calibration import BandedCalibration, Calibration, given_calibration, given_costs
from draftsmith.infer.costs.pass_costs import Costs
from draftsmith.infer.costs.rates import Rates

log = logging.getLogger(__name__)


@runtime_checkable
class AssumesCosts(Protocol):
    """A drafter that may need pass costs to decode at all: where none were measured, these are used."""

    def assumed_costs(self, target: Target) -> Costs | None: ...


class Policy:
    """`Policy()` limits nothing. A step calls `begin`, `limits`, the drafter's propose, `cut` and `settle`.

    `batch_size`: how many rows the engine decodes at once when it has enough of them. `raw`: drafters state their
    confidences uncorrected, for a calibration to be measured.
    """

    def __init__(
        self,
        costs: Costs | None = None,
        calibration: BandedCalibration | None = None,
        batch_size: int = 1,
        raw: bool = False,
    ) -> None:
        self.costs = costs
        self.raw = raw
        self.calibrations = calibration
        self._joint = None if costs is None else Account(costs)
        self._alone: dict[Row, Account] = {}
        self._asking_alone: dict[Row, Asking] = {}
        self.batch_size = batch_size
        self._rates = Rates()
        self._built: set[Row] = set()
        self._asking = Asking(0.0 if costs is None else costs.asking)
        self._waiting: set[Row] = set()
        self._gains: dict[Row, float] = {}
        self._outright: set[Row] = set()

    @classmethod
    def of(
        cls, target: Target, drafter: Drafter, calibration: Any = "auto", costs: Any = "auto", batch_size: int = 1
    ) -> Policy:
        """The policy of `drafter` with `target`.

        Args:
            calibration: a file, a Calibration, none, or auto: what the drafter was given as its `calibration`, else
                what `draftsmith calibrate` measured for this draft and target.
            costs: the same for measured pass costs, of this machine.
            batch_size: how many rows are decoded at once.
        """
        # A draft model that was not loaded by name cannot be recognised again.
        draft = drafter.origin or ("" if drafter.pass_timers() else drafter.name)
        given = [getattr(drafter, "calibration", "auto"), getattr(drafter, "costs", "auto")]
        given = [own if asked == "auto" else asked for own, asked in zip(given, (calibration, costs))]
        known, measured = given_calibration(given[0], draft, target), given_costs(given[1], draft, target)
        assumed = drafter.assumed_costs(target) if isinstance(drafter, AssumesCosts) else None
        if assumed is not None:
            missing = [word for word, found in (("calibration", known), ("costs", measured)) if found is None]
            if missing:
                log.warning(
                    "%s has no %s for this target and uses assumed values: `draftsmith calibrate` measures them",
                    drafter.origin or drafter.name,
                    " and no ".join(missing),
                )
        return cls(measured or assumed, known, batch_size)

    @property
    def joint(self) -> Account:
        """The account of the whole batch; only with costs."""
        assert self._joint is not None, "a policy without costs has no accounts"
        return self._joint

    def alone(self, row: Row) -> Account:
        """The account of a row that draws its draft, as if it were decoded among rows like it."""
        assert self.costs is not None, "a policy without costs has no accounts"
        if row not in self._alone:
            displaced = 1.0 if self.batch_size == 1 else DISPLACED
            account = self._alone[row] = Account(self.costs, displaced, self.batch_size)
            known = None if self.calibrations is None else self.calibrations.measured(row.settings.temperature, True)
            if known is not None and known.first_accepted is not None:
                account.expect_drawn(drawn_share(known.first_accepted))
            account.begin([row])
            self._asking_alone[row] = Asking(self.costs.asking)
        return self._alone[row]

    # one step

    def begin(self, rows: Sequence[Row]) -> None:
        """Start a step of `rows`. A step that failed may be begun again."""
        self._built, self._waiting, self._gains = set(), set(), {}
        if self._joint is not None:
            self._joint.begin(rows)
        for row in rows:
            if row in self._alone:
                self._alone[row].begin([row])

    def limits(self, rows: Sequence[Row], budgets: Sequence[Budget]) -> list[Budget]:
        """The budgets, empty for rows that are not worth asking in this step (infer/costs/asking.py).

        Only rows whose drafts were outright so far, as what they draft does not change their text, and rows that draw:
        each of these by its own past.
        """
        if self._joint is None:
            return list(budgets)
        self._waiting = {row for row in rows if not self._wanted(row)}
        return [Budget(0, 0) if row in self._waiting else budget for row, budget in zip(rows, budgets)]

    def _wanted(self, row: Row) -> bool:
        if row in self._alone:
            return self._asking_alone[row].wanted(row, self._alone[row].plain_seconds)
        return row not in self._outright or self._asking.wanted(row, self.joint.plain_seconds)

    def cut(self, rows: Sequence[Row], drafts: Sequence[Draft]) -> list[Draft]:
        """The drafts without the nodes that are not worth verifying. Nodes keep their order.

        Drafts that were built with this policy, and drawn ones, are left as they are.
        """
        if self._joint is None:
            return list(drafts)
        fixed = {
            row: len(draft) for row, draft in zip(rows, drafts) if row in self._built or not _is_outright(draft)
        }  # fmt: skip
        reaches = {row: self._reaches(row, draft) for row, draft in zip(rows, drafts) if row not in fixed}
        counts = self._best(reaches, fixed)
        for row, draft in zip(rows, drafts):
            if draft.whole and row in counts and len(counts[row]) < len(draft):
                counts[row] = set()
        kept = {row: [reach for reach, node in some if node in counts[row]] for row, some in reaches.items()}
        self._outright |= self._built | {row for row, draft in zip(rows, drafts) if row in reaches and len(draft)}
        self._outright -= fixed.keys() - self._built
        gains = self._joint.gains(kept, fixed)
        gains |= {row: self._asking.built(len(draft)) for row, draft in zip(rows, drafts) if row in self._built}
        self._gains = {row: gain for row, gain in gains.items() if row in self._outright - self._waiting}
        return [draft if row in fixed else _only(draft, counts[row]) for row, draft in zip(rows, drafts)]

    def settle(self, rows: Sequence[Row], drafts: Sequence[Draft], verdicts: Sequence[Verdict]) -> None:
        """End the step: `drafts` were verified, and became `verdicts`."""
        if self._joint is None:
            return
        nodes = {row: len(draft) for row, draft in zip(rows, drafts)}
        self._joint.settle(nodes, sum(len(verdict.committed) for verdict in verdicts))
        right, reached, promised = 0, 0, 0.0
        self._rates.next_step()
        self._asking.settle(self._gains, self._waiting - self._alone.keys())
        for row, draft, verdict in zip(rows, drafts, verdicts):
            found = _outcome(draft, verdict)
            if row in self._alone:
                asked = {} if row in self._waiting else {row: self._asking.built(nodes[row])}
                self._asking_alone[row].settle(asked, self._waiting & {row})
                self._alone[row].settle({row: nodes[row]}, len(verdict.committed))
                self._alone[row].checked(*found)
                self._alone[row].drew(_drawn_first(draft, verdict))
            elif row in self._built:
                right, reached, promised = right + found[0], reached + found[1], promised + found[2]
            elif draft.trials and _is_outright(draft):
                self._rates.observe(draft, verdict, self._measured(row))
        self._joint.checked(right, reached, promised)

    def close(self, rows: Sequence[Row]) -> None:
        """Forget `rows`, which leave."""
        for row in rows:
            self._alone.pop(row, None)
            self._asking_alone.pop(row, None)
            self._asking.close(row)
            self._outright.discard(row)

    # for drafters that build their tree with the policy

    def calibration(self, row: Row, coupled: bool = False) -> Calibration | None:
        """The calibration of the row's temperature. `coupled`: above 0, of candidates that share the noise of the
        target's draws."""
        return None if self.calibrations is None else self.calibrations.at(row.settings.temperature, coupled)

    def calibrated(self, row: Row, source: str, raw: Sequence[float], coupled: bool = False) -> list[float]:
        """The probabilities of acceptance of one node's candidates, best first; raw without a calibration."""
        known = self.calibration(row, coupled)
        return list(raw) if known is None else known.probabilities(source, raw)

    def expect(self, rows: Sequence[Row], coupled: bool, calibrations: BandedCalibration | None = None) -> None:
        """Prepare the account of these rows for what a draft model is about to draft. `calibrations`: the draft model's
        own, where it is part of a mix.

        Before any node was expanded, the share of those with a right child is what was measured at the rows'
        temperatures for the best candidate alone. Coupled drafts gained 1.25x over plain decoding with seconds as
        measured, and 1.17x with those that allow for displaced caches (batch of one).
        """
        if self._joint is None:
            return
        warm = coupled and not all(row.settings.greedy for row in rows)
        self._joint.displaced = 1.0 if warm else DISPLACED
        own = calibrations or self.calibrations
        known = [own.at(row.settings.temperature, coupled) for row in rows] if own is not None else []
        shares = [one.first_accepted for one in known if one is not None and one.first_accepted is not None]
        if shares:
            self._joint.prior_coverage = sum(shares) / len(shares)

    def charge(self, name: str, tokens: Mapping[Row, int], entering: bool = True) -> None:
        """Account for a draft pass over `tokens` of each row. `entering`: every new node goes through this pass; it is
        not a deeper block."""
        if self._joint is None:
            return
        self._joint.charge(name, tokens, entering)
        for row, count in tokens.items():
            if row in self._alone:
                self._alone[row].charge(name, {row: count}, entering)

    def width(self, reaches: Mapping[Row, Sequence[float]]) -> dict[Row, int]:
        """How many of each row's nodes to verify, given their reaches in descending order; `cut` will leave them."""
        self._built |= set(reaches)
        trust = self.joint.trust
        ranked = {row: [(reach * trust, node) for node, reach in enumerate(some)] for row, some in reaches.items()}
        return {row: len(kept) for row, kept in self._best(ranked, {}).items()}

    # pricing

    def _best(self, nodes: Mapping[Row, Sequence[tuple[float, int]]], fixed: Mapping[Row, int]) -> dict[Row, set[int]]:
        """Of all rows' (reach, node), the nodes to verify."""
        offers = sorted(
            ((reach, row, node) for row, some in nodes.items() for reach, node in some), key=lambda offer: -offer[0]
        )
        count = self.joint.keep([(reach, row) for reach, row, _ in offers], fixed)
        kept: dict[Row, set[int]] = {row: set() for row in nodes}
        for _, row, node in offers[:count]:
            kept[row].add(node)
        return kept

    def _reaches(self, row: Row, draft: Draft) -> list[tuple[float, int]]:
        """(reach, node): the product of the probabilities down to it. A probe is worth nothing by itself. The nodes of
        a draft that is verified as a whole share what it is worth."""
        if not draft.trials:  # of a drafter that draws for this row, nothing outright was calibrated
            return []
        reaches = [0.0] * len(draft)
        known = self.calibration(row)
        for parent in sorted(draft.trials):
            above = 1.0 if parent == ROOT else reaches[parent]
            for rank, trial in enumerate(draft.trials[parent]):
                measured = None
                if known is not None and trial.source in known.curves:
                    measured = known.of(trial.source, rank)(trial.confidence)
                reaches[trial.node] = above * self._rates.corrected(trial.source, rank, trial.confidence, measured)
        if draft.whole and len(draft):
            reaches = [sum(reaches) / len(draft)] * len(draft)
        return [(reach, node) for node, reach in enumerate(reaches)]

    def _measured(self, row: Row) -> Sequence[str]:
        known = self.calibration(row)
        return () if known is None else list(known.curves)


def drawn_share(coupled: float) -> float:
    """About how often drawn tokens are accepted, where a coupled one is right with probability `coupled`.

    If the distributions differ by d in total variation, a drawn token is accepted with probability 1 - d, and a coupled
    one with at least (1 - d) / (1 + d) and at most 1 - d (arXiv 2408.07978): the middle of what that leaves.
    """
    share = (coupled + 2 * coupled / (1 + coupled)) / 2
    return min(max(share, 0.02), 0.98)


def _is_outright(draft: Draft) -> bool:
    return all(trial.group.outright for trials in draft.trials.values() for trial in trials)


def _outcome(draft: Draft, verdict: Verdict) -> tuple[int, int, float]:
    """How many of the expanded nodes that were reached had a right child, their number, and what was promised.

    Of a draft verified jointly (only drawn ones are) it is how far the draft came: what one as deep is worth.
    """
    parents = [parent for parent in (ROOT, *verdict.path) if parent in draft.trials]
    promised = [min(sum(trial.confidence for trial in draft.trials[parent]), 1.0) for parent in parents]
    return len(verdict.path), len(parents), sum(promised)


def _drawn_first(draft: Draft, verdict: Verdict) -> list[tuple[float, bool]]:
    """For each node that was reached and whose first trial was drawn: the concentration of the distribution that it was
    drawn from, and whether its token was accepted.

    Only the path counts, as a rule need not try one node after the other (infer/contract/protocols.py)."""
    found = []
    for parent, child in zip((ROOT, *verdict.path), (*verdict.path, None)):
        first = next(iter(draft.trials.get(parent, ())), None)
        if first is not None and first.group.draft_probs is not None:
            found.append((concentration(first.group.draft_probs), child == first.node))
    return found


def _only(draft: Draft, kept: set[int]) -> Draft:
    """The draft of these nodes, in their order; a parent's reach is never below its child's, so it is among them."""
    if len(kept) == len(draft):
        return draft
    fresh, placed = Draft(), {ROOT: ROOT}
    for node in sorted(kept):
        placed[node] = fresh.node(placed[draft.parents[node]], draft.tokens[node])
    for parent, trials in draft.trials.items():
        left = [trial._replace(node=placed[trial.node]) for trial in trials if trial.node in kept]
        if left:
            fresh.trials[placed[parent]] = left
    fresh.probes = {placed[node] for node in draft.probes if node in kept}
    fresh.exits = list(draft.exits)
    fresh.also = {placed[node]: names for node, names in draft.also.items() if node in kept}
    return fresh
