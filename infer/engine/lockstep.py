"""The columns of a `generate` call: the token that every row of the batch gets at one position.

`generate` decodes its rows in step: one column, then the stopping criteria over the whole batch, then the streamer.
Drafted rows run ahead of one another, so their columns are completed later. Criteria and streamer still get every
column once, in order and with the arguments that `generate` gives them; what a row decoded beyond its end is dropped.

Legend: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Lockstep:
    """Completes columns from what the rows have decoded. `limit`: the most new tokens of a row.

    `over` is whether every row has ended.
    """

    def __init__(
        self, input_ids_BT: torch.Tensor, criteria: Any, pad: int | None, limit: int, streamer: Any | None
    ) -> None:
        rows, self._width = input_ids_BT.shape
        self._ids_BT = input_ids_BT.new_zeros((rows, self._width + limit))
        self._ids_BT[:, : self._width] = input_ids_BT
        self._done = 0
        self._criteria = criteria
        # As in `generate`: without a stop token, rows that have ended go on until the last one ends.
        self._pads = any(hasattr(one, "eos_token_id") for one in criteria)
        self._pad = pad
        self._streamer = streamer
        self._unfinished_B = torch.ones(rows, dtype=torch.bool, device=input_ids_BT.device)
        self.over = False

    def advance(self, new_ids: Sequence[Sequence[int]]) -> list[int]:
        """Complete every column that `new_ids`, all new tokens of each row, allows; the rows that need no more."""
        ended: list[int] = []
        waiting = [not self._pads or alive for alive in self._unfinished_B.tolist()]
        while not self.over and all(len(ids) > self._done for ids, wait in zip(new_ids, waiting) if wait):
            column = [ids[self._done] if wait else self._pad for ids, wait in zip(new_ids, waiting)]
            alive = self._complete(torch.tensor(column, dtype=self._ids_BT.dtype, device=self._ids_BT.device))
            for row, goes_on in enumerate(alive):
                if waiting[row] and self._pads and not goes_on:
                    waiting[row] = False
                    ended.append(row)
            self.over = not any(alive)
        return ended

    @property
    def sequences(self) -> torch.Tensor:
        """[B, T] prompts and new tokens, as `generate` returns them."""
        return self._ids_BT[:, : self._width + self._done].clone()

    def _complete(self, column_B: torch.Tensor) -> list[bool]:
        """Store a column, call criteria and streamer; which rows go on."""
        self._ids_BT[:, self._width + self._done] = column_B
        self._done += 1
        ended_B = self._criteria(self._ids_BT[:, : self._width + self._done], None)
        self._unfinished_B = self._unfinished_B & ~ended_B
        if self._streamer is not None:
            self._streamer.put(column_B.cpu())
        alive: list[bool] = self._unfinished_B.tolist()
        return alive
