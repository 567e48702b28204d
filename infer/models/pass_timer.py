"""Timing a model's passes: implementations of infer/costs/timing.py's PassTimer for the cached models."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch

from draftsmith.infer.costs.timing import SPARE
from draftsmith.infer.models.cached_lm import CachedLM, Entries
from draftsmith.infer.models.exit_lm import ExitLM


class CachedPassTimer:
    """A target's or a draft model's cached passes. A pass ends, as a greedy one does, with the choices read off."""

    def __init__(self, lm: CachedLM) -> None:
        self.lm = lm
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
            # Committed, though no pass has written them: the slots hold what they hold.
            self.lm.commit(row, list(range(context)))

    def run(self, tokens: int) -> None:
        logits_BQV, _ = self.lm.forward(self._rows, [Entries.chain([0] * tokens) for _ in self._rows])
        logits_BQV.argmax(-1).tolist()
        for row in self._rows:
            self.lm.commit(row, [])

    def around(self, rows: int, tokens: int, context: int, tries: int = 9) -> float:
        """Seconds of such a pass that are not the model's own: masks before it, choices after it."""
        self.place(rows, context)
        taken = []
        for _ in range(tries):
            inside, began = self.lm.forward_seconds, time.perf_counter()
            self.run(tokens)
            taken.append(time.perf_counter() - began - (self.lm.forward_seconds - inside))
        self.close()
        return median(taken)

    def close(self) -> None:
        for row in reversed(self._rows):
            self.lm.close(row)
        self._rows = []


class ExitPassTimer:
    """The passes of one block of a sorted draft over new entries, with the head that its exit is read through."""

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
                self.lm.place_uncommitted(row, tokens, self.block)
            states = self.lm.deepen(self._rows, self.block, wanted)
        self.lm.logits(torch.cat(states)).argmax(-1).tolist()
        for row in self._rows:
            self.lm.commit(row, [])

    def close(self) -> None:
        for row in reversed(self._rows):
            self.lm.close(row)
        self._rows = []
