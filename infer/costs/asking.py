"""Which rows to ask for a draft: a proposal takes time too, which is lost where nothing of it is worth verifying.

Asking a row takes `Costs.asking` seconds, and gains what the policy expects of the nodes that it keeps; a draft that
was built with the policy paid before it was built. While the mean gain of a row's drafts is below that, the row is
asked only so often that asking takes SHARE of plain decoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from draftsmith.infer.contract.row import Row

# Decay of a row's mean gain per draft.
KEPT = 0.9
# The most that asking in vain may cost, as a share of plain decoding.
SHARE = 0.01
# A drafter that was never asked is taken to gain this many times what asking costs.
HOPE = 4.0
# What a draft gains that was built with the policy, by the same measure: one makes up for the empty ones before it.
BUILT = 10.0


@dataclass(slots=True)
class _Asked:
    """`gain`: mean seconds gained per draft; `waited`: steps since the last one."""

    gain: float
    waited: int = 0


class Asking:
    """Decides by gains in modelled seconds, never by the clock. `seconds`: what asking one row takes."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        # Over all rows: what a new row's drafts are expected to gain.
        self._usual = HOPE * seconds
        self._rows: dict[Row, _Asked] = {}

    def built(self, nodes: int) -> float:
        """The seconds that a draft of `nodes` nodes gains if it was built with the policy."""
        return BUILT * self._seconds if nodes else 0.0

    def wanted(self, row: Row, plain_seconds: float) -> bool:
        """Whether to ask `row` in this step; `plain_seconds`: a token's in plain decoding."""
        asked = self._rows.get(row)
        if asked is None or asked.gain >= self._seconds:
            return True
        return asked.waited + 1 >= ceil(self._seconds / (SHARE * plain_seconds))

    def settle(self, gains: Mapping[Row, float], waiting: set[Row]) -> None:
        """End a step in which the drafts of some rows gained this many seconds, and others were not asked."""
        for row, gain in gains.items():
            asked = self._rows.setdefault(row, _Asked(self._usual))
            asked.gain, asked.waited = KEPT * asked.gain + (1 - KEPT) * gain, 0
            self._usual = KEPT * self._usual + (1 - KEPT) * gain
        for row in waiting:
            self._rows[row].waited += 1

    def close(self, row: Row) -> None:
        self._rows.pop(row, None)
