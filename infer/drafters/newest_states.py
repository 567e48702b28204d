"""What a drafter keeps of a target's states if it reads the newest one only.

Legend: T positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from draftsmith.infer.contract.protocols import Feedback
from draftsmith.infer.contract.row import Row


class NewestStates:
    """The state `feature` of each row's newest token but one, whose successor is the newest: the target has not read
    the newest token itself before it verifies the next draft."""

    def __init__(self, feature: str) -> None:
        self.feature = feature
        self._found: dict[Row, tuple[int, torch.Tensor]] = {}

    def read(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        """Take over what has entered the target's cache."""
        for row, given in zip(rows, feedback):
            states_TD = given.features.get(self.feature)
            if states_TD is not None and len(states_TD):
                # A copy: a view would hold the states of the whole prompt.
                self._found[row] = given.start + len(states_TD) - 1, states_TD[-1].clone()

    def of(self, row: Row) -> torch.Tensor | None:
        """[D]; None where no state predicted the newest token: a prompt of one token, a new turn, a lost step."""
        position, state_D = self._found.get(row, (-1, None))
        return state_D if position == len(row.ids) - 2 else None

    def close(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._found.pop(row, None)
