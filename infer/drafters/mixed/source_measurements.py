"""What was measured for the drafters of a mix: a calibration each, and one set of pass costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from draftsmith.infer.contract.protocols import Drafter, Target, couples
from draftsmith.infer.contract.row import Row
from draftsmith.infer.costs.calibration import BandedCalibration, Calibration
from draftsmith.infer.costs.pass_costs import Costs
from draftsmith.infer.costs.policy import Policy


@dataclass(frozen=True, slots=True)
class SourceMeasurements:
    """`calibrations`: by number of the drafter. `costs`: of the target and of every draft model, or None. `coupled`:
    the drafters whose candidates share the noise of the target's draws."""

    calibrations: Mapping[int, BandedCalibration]
    costs: Costs | None
    coupled: frozenset[int] = frozenset()

    @classmethod
    def of(cls, drafters: Sequence[Drafter], target: Target) -> SourceMeasurements:
        """Of bound drafters, each as it was given or found for it."""
        calibrations: dict[int, BandedCalibration] = {}
        costs: list[Costs] = []
        missing = False
        for number, drafter in enumerate(drafters):
            own = Policy.of(target, drafter)
            if own.calibrations is not None:
                calibrations[number] = own.calibrations
            if own.costs is None:
                missing = missing or bool(drafter.pass_timers())
            elif drafter.pass_timers():
                costs.insert(0, own.costs)
            else:
                costs.append(own.costs)
        coupled = frozenset(number for number, one in enumerate(drafters) if couples(one))
        return cls(calibrations, _joined(costs) if costs and not missing else None, coupled)

    def calibration(self, number: int, row: Row) -> Calibration | None:
        """The drafter's at the row's temperature."""
        known = self.calibrations.get(number)
        return None if known is None else known.at(row.settings.temperature, number in self.coupled)

    def calibrated(self, number: int) -> Callable[[Row, str, list[float]], list[float]]:
        """Turns the raw confidences of one node's candidates, likeliest first, into probabilities of acceptance."""

        def probabilities(row: Row, source: str, raw: list[float]) -> list[float]:
            known = self.calibration(number, row)
            return raw if known is None else known.probabilities(source, raw)

        return probabilities


def _joined(costs: Sequence[Costs]) -> Costs:
    """The passes of all; the target's, and what its steps take besides, as the first measured it."""
    passes = {name: cost for one in reversed(costs) for name, cost in one.passes.items()}
    return replace(costs[0], passes=passes, asking=sum(one.asking for one in costs))
