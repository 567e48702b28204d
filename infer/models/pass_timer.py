"""Timing the blocks of a sorted draft: a block's pass over new entries, with the head that its exit is read through."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from draftsmith.infer.costs.timing import SPARE
from draftsmith.infer.models.cached_lm import Entries
from draftsmith.infer.models.exit_lm import ExitLM


class ExitLab:
    """A lab (latency.py) of one block of `lm`."""

    def __init__(self, lm: ExitLM, block: int) -> None:
        self.lm = lm
        self.block = block
        self._rows: list[object] = []

    @property
    def buckets(self) -> Sequence[int]:
        return self.lm.buckets

    @property
    def device(self) -> torch.device:
        return self.lm.device

    def place(self, rows: int, context: int) -> None:
        self.close()
        self._rows = [object() for _ in range(rows)]
        for row in self._rows:
            self.lm.open(row, context + SPARE)
        # One token through every block, so that all buffers are there.
        self.lm.prefill(self._rows, [[0]] * rows, len(self.lm.exits))
        for row in self._rows:
            self.lm.place(row, context)

    def run(self, tokens: int) -> None:
        wanted = [list(range(tokens)) for _ in self._rows]
        if self.block == 0:
            states = self.lm.enter(self._rows, [Entries.chain([0] * tokens) for _ in self._rows])
        else:
            for row in self._rows:
                self.lm.place_flight(row, tokens, self.block)
            states = self.lm.deepen(self._rows, self.block, wanted)
        self.lm.logits(torch.cat(states)).argmax(-1).tolist()
        for row in self._rows:
            self.lm.commit(row, [])

    def close(self) -> None:
        for row in reversed(self._rows):
            self.lm.close(row)
        self._rows = []
