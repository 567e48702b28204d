"""Timers of passes: the PassTimer of infer/costs/timing.py for CachedLM, ExitLM and ChainRunner."""

from __future__ import annotations

import time
from statistics import median

import torch

from draftsmith.infer.costs.timing import SPARE
from draftsmith.infer.models.cached_lm import CachedLM, Entries
from draftsmith.infer.models.chain_runner import ChainRunner
from draftsmith.infer.models.exit_lm import ExitLM
from draftsmith.infer.models.positions import max_positions


class TimedRows:
    """The rows that a timer holds in a model's cache, all with the same context length."""

    def __init__(self, lm: CachedLM | ExitLM) -> None:
        self.lm = lm
        self.rows: list[object] = []

    def open(self, rows: int, context: int) -> None:
        self.close()
        self.rows = [object() for _ in range(rows)]
        self.lm.cache.reserve(rows, context + SPARE)  # at once: growing row by row copies all rows for each
        for row in self.rows:
            self.lm.open(row, context + SPARE)

    def entries(self, tokens: int) -> list[Entries]:
        return [Entries.chain([0] * tokens) for _ in self.rows]

    def finish(self, logits: torch.Tensor) -> None:
        """End a pass as greedy decoding does, reading the choices, and commit nothing."""
        logits.argmax(-1).tolist()
        for row in self.rows:
            self.lm.commit(row, [])

    def close(self) -> None:
        for row in reversed(self.rows):
            self.lm.close(row)
        self.rows = []


class CachedPassTimer:
    """Times the passes of a target or a draft model."""

    def __init__(self, lm: CachedLM) -> None:
        self.lm = lm
        self.buckets, self.device = lm.buckets, lm.device
        self.max_positions = max_positions(lm.model.config.get_text_config())
        self._timed = TimedRows(lm)
        self.close = self._timed.close

    def place(self, rows: int, context: int) -> None:
        self._timed.open(rows, context)
        for row in self._timed.rows:
            # Committed without a pass: what the cache holds does not affect its speed.
            self.lm.commit(row, list(range(context)))

    def run(self, tokens: int) -> None:
        logits_BQV, _ = self.lm.forward(self._timed.rows, self._timed.entries(tokens))
        self._timed.finish(logits_BQV)

    def around(self, rows: int, tokens: int, context: int, tries: int = 9) -> float:
        """Seconds of a pass outside the model itself: masks before it, choices after it."""
        self.place(rows, context)
        taken = []
        for _ in range(tries):
            inside, began = self.lm.forward_seconds, time.perf_counter()
            self.run(tokens)
            taken.append(time.perf_counter() - began - (self.lm.forward_seconds - inside))
        self.close()
        return median(taken)


class ChainPassTimer:
    """Times the passes of a model with recurrent states: all rows have equally many tokens: one segment."""

    def __init__(self, runner: ChainRunner) -> None:
        self.runner = runner
        self.buckets, self.device = runner.buckets, runner.device
        self.max_positions = max_positions(runner.model.config.get_text_config())
        self._rows: list[object] = []

    def place(self, rows: int, context: int) -> None:
        self.close()
        self._rows = [object() for _ in range(rows)]
        for row in self._rows:
            self.runner.open(row, context + SPARE)
        # One token allocates all buffers and states.
        self.runner.forward(self._rows, [Entries.chain([0]) for _ in self._rows])
        self.runner.commit(self._rows, [[0] for _ in self._rows])
        for row in self._rows:
            self.runner.place(row, context)

    def run(self, tokens: int) -> None:
        output = self.runner.forward(self._rows, [Entries.chain([0] * tokens) for _ in self._rows])
        output.logits_NV.argmax(-1).tolist()
        self.runner.drop(self._rows)

    def close(self) -> None:
        for row in reversed(self._rows):
            self.runner.close(row)
        self._rows = []


class ExitPassTimer:
    """Times the passes of one block of a sorted draft over new entries, and of the head that reads its exit."""

    def __init__(self, lm: ExitLM, block: int) -> None:
        self.lm = lm
        self.block = block
        self.buckets, self.device = lm.buckets, lm.device
        self.max_positions = max_positions(lm.model.config.get_text_config())
        self._timed = TimedRows(lm)
        self.close = self._timed.close

    def place(self, rows: int, context: int) -> None:
        self._timed.open(rows, context)
        # One token through every block allocates all buffers.
        self.lm.prefill(self._timed.rows, [[0]] * rows, len(self.lm.exits))
        for row in self._timed.rows:
            self.lm.place(row, context)

    def run(self, tokens: int) -> None:
        rows = self._timed.rows
        if self.block == 0:
            states = self.lm.enter(rows, self._timed.entries(tokens))
        else:
            for row in rows:
                self.lm.place_uncommitted(row, tokens, self.block)
            states = self.lm.deepen(rows, self.block, [list(range(tokens)) for _ in rows])
        self._timed.finish(self.lm.logits(torch.cat(states)))
