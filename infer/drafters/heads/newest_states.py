"""What a drafter keeps of a target's states if it reads the newest one only.

Legend: T positions, H width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from draftsmith.infer.contract.protocols import Feedback
from draftsmith.infer.contract.row import Row

# No positions of its own.
ANY_LENGTH = 1 << 30


class NewestStates:
    """The state `feature` of each row's newest token but one, which predicted the newest: the target has not read that
    itself before it verifies the next draft."""

    max_positions = ANY_LENGTH

    def __init__(self, feature: str) -> None:
        self.feature = feature
        self._found: dict[Row, tuple[int, torch.Tensor]] = {}

    def open(self, row: Row, nodes: int) -> None:
        """Nothing is held for a row before its first state."""

    def close(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._found.pop(row, None)

    def abandon(self, row: Row) -> None:
        """Nothing is kept of a step before its end."""

    def take(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        """Note what has entered the target's cache."""
        for row, given in zip(rows, feedback):
            states_TH = given.features.get(self.feature)
            if states_TH is not None and len(states_TH):
                # A copy: a view would hold the states of the whole prompt.
                self._found[row] = given.start + len(states_TH) - 1, states_TH[-1].clone()

    def there(self, row: Row) -> bool:
        """Whether the state that predicted the row's newest token is known: not of a prompt of one token, nor of a new
        turn or after a lost step."""
        return row in self._found and self._found[row][0] == len(row.ids) - 2

    def unread(self, row: Row) -> int:
        return 0

    def read(self, upto: Sequence[tuple[Row, int]]) -> None:
        """There is nothing to run."""

    def pending(self, rows: Sequence[Row]) -> dict[Row, int]:
        return {}

    def newest(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """[H] of each row."""
        return [self._found[row][1] for row in rows]

    def along(self, states_TH: torch.Tensor) -> torch.Tensor:
        """[T, H] what heads read at each position of a text with these states."""
        return states_TH
