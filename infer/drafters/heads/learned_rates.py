"""How often a drafter's candidates came true, learned while decoding: until something was calibrated.

For drafters whose candidates at a position do not depend on the tokens drafted before it: each committed token grades
all candidates for its place, drafted or not. There is a rate for each band of temperatures, source, rank and range of
confidence (infer/costs/rates.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from draftsmith.infer.contract.row import Row
from draftsmith.infer.costs.calibration import band_of
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.costs.rates import Rates


@dataclass(frozen=True, slots=True)
class _Stated:
    """A position's candidates, best first, with the confidences that the drafter stated."""

    source: str
    tokens: list[int]
    raw: list[float]


@dataclass(slots=True)
class LearnedRates:
    """The rates outlive rows. `stated`: of each row's current draft, by position."""

    _rates: dict[str, Rates] = field(default_factory=dict)
    _stated: dict[Row, dict[int, _Stated]] = field(default_factory=dict)

    def begin(self, rows: Sequence[Row]) -> None:
        """A new draft for each of these rows."""
        for row in rows:
            self._stated[row] = {}

    def note(self, row: Row, position: int, source: str, tokens: list[int], raw: list[float]) -> None:
        """The candidates for a position of the row, which its draft may hold."""
        self._stated[row].setdefault(position, _Stated(source, tokens, raw))

    def corrected(self, policy: Policy, row: Row, source: str, raw: list[float], coupled: bool) -> list[float]:
        """The probabilities of acceptance of one node's candidates, best first: calibrated, or as learned."""
        if policy.raw or policy.calibration(row, coupled) is not None:
            return policy.calibrated(row, source, raw, coupled)
        rates = self._of(row, coupled)
        return [rates.corrected(source, rank, one, None) for rank, one in enumerate(raw)]

    def observe(self, rows: Sequence[Row], coupled: bool) -> None:
        """Grade what was stated; `row.ids` holds the committed tokens."""
        graded = {row: self._stated.pop(row) for row in rows if row in self._stated}
        for rates in {id(rates): rates for rates in (self._of(row, coupled) for row in graded)}.values():
            rates.next_step()
        for row, stated in graded.items():
            rates = self._of(row, coupled)
            for position, one in stated.items():
                if position < len(row.ids):
                    for rank, (token, raw) in enumerate(zip(one.tokens, one.raw)):
                        rates.note(one.source, rank, raw, token == row.ids[position])

    def close(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._stated.pop(row, None)

    def _of(self, row: Row, coupled: bool) -> Rates:
        return self._rates.setdefault(band_of(row.settings.temperature, coupled), Rates())
