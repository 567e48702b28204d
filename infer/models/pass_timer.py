"""Timers of passes: the PassTimer of infer/costs/timing.py for a ModelRunner and a ChainRunner."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from draftsmith.infer.contract.protocols import PassTimer
from draftsmith.infer.costs.timing import SPARE
from draftsmith.infer.models.positions import max_positions
from draftsmith.infer.models.runner.chain_runner import ChainRunner
from draftsmith.infer.models.runner.entries import Entries
from draftsmith.infer.models.runner.masks import MaskPlan
from draftsmith.infer.models.runner.model_runner import ModelRunner
from draftsmith.infer.models.tensor_parallel.leading_runner import LeadingRunner
from draftsmith.infer.models.top_reader import chosen

# Buckets are sought among these numbers of tokens, behind this context, in models of SMALL bytes or more.
TRIED = (1, 2, 3, 4, 8)
BUCKET_CONTEXT, BUCKET_TRIES, SMALL = 64, 7, 1 << 24
CLEARLY_LESS = 0.92


TimedRunner = ModelRunner | LeadingRunner | ChainRunner
Begin = Callable[[Sequence[object]], None]


class TimedRows:
    """The rows that a timer holds in a model's cache, all with the same context length. `begin`: what is done to new
    rows first."""

    def __init__(self, lm: TimedRunner, begin: Begin | None = None) -> None:
        self.lm = lm
        self.begin = begin
        self.rows: list[object] = []

    def open(self, rows: int, context: int) -> None:
        self.close()
        self.rows = [object() for _ in range(rows)]
        for row in self.rows:
            self.lm.open(row, context + SPARE)
        if self.begin is not None:
            self.begin(self.rows)
        self.lm.place(self.rows, context)

    def entries(self, tokens: int, states: Callable[[int], torch.Tensor] | None = None) -> list[Entries]:
        """`states`: makes what is run in place of the embeddings of that number of tokens."""
        chains = [Entries.chain([0] * tokens) for _ in self.rows]
        return chains if states is None else [replace(one, states=states(tokens)) for one in chains]

    def finish(self, logits: torch.Tensor) -> None:
        """End a pass as greedy decoding does, reading the choices, and commit nothing."""
        chosen(logits).tolist()
        self.lm.drop(self.rows)

    def close(self) -> None:
        for row in reversed(self.rows):
            self.lm.close(row)
        self.rows = []


class CachedPassTimer:
    """Times the passes of a target or a draft model. `states`: as of TimedRows.entries; `begin`: as of TimedRows."""

    def __init__(
        self, lm: TimedRunner, states: Callable[[int], torch.Tensor] | None = None, begin: Begin | None = None
    ) -> None:
        self.lm = lm
        self._states = states
        self.buckets, self.device = lm.buckets, lm.device
        self.max_positions = max_positions(lm.model.config.get_text_config())
        self._timed = TimedRows(lm, begin)
        self.place, self.close = self._timed.open, self._timed.close

    def run(self, tokens: int) -> None:
        entries = self._timed.entries(tokens, self._states)
        self._timed.finish(self.lm.forward(self._timed.rows, entries).logits_NV)

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


class TimerOnceBound:
    """Times passes of a draft that may be loaded only when its drafter is bound: `make` makes the timer. Before that
    there is nothing to be timed."""

    def __init__(self, make: Callable[[], PassTimer]) -> None:
        self._make = make
        self._made: PassTimer | None = None

    @property
    def _timer(self) -> PassTimer:
        self._made = self._made or self._make()
        return self._made

    @property
    def buckets(self) -> Sequence[int]:
        return self._timer.buckets

    @property
    def device(self) -> torch.device:
        return self._timer.device

    @property
    def max_positions(self) -> int:
        return self._timer.max_positions

    def place(self, rows: int, context: int) -> None:
        self._timer.place(rows, context)

    def run(self, tokens: int) -> None:
        self._timer.run(tokens)

    def close(self) -> None:
        if self._made is not None:
            self._made.close()


def measured_buckets(model: Any, plan: MaskPlan) -> tuple[int, ...]:
    """Numbers of tokens that passes of this model are padded to, because it runs them faster than fewer tokens.

    Timed on the model itself, for what is faster differs between processors and widths. A model whose weights take
    less than SMALL bytes is not worth it.
    """
    lm = ModelRunner(model, plan)
    if lm.weight_bytes < SMALL:
        return ()
    timer = CachedPassTimer(lm)
    timer.place(1, BUCKET_CONTEXT)
    taken: dict[int, list[float]] = {tokens: [] for tokens in TRIED}
    for attempt in range(BUCKET_TRIES + 1):
        for tokens in TRIED:
            began = time.perf_counter()
            timer.run(tokens)
            if attempt:  # the first round warms up
                taken[tokens].append(time.perf_counter() - began)
    timer.close()
    best = {tokens: min(seconds) for tokens, seconds in taken.items()}
    # The number that each is best padded to: itself, if none is clearly faster.
    faster = {tokens: min((more for more in TRIED if more >= tokens), key=lambda more: best[more]) for tokens in TRIED}
    padded_to = {n: more if best[more] < CLEARLY_LESS * best[n] else n for n, more in faster.items()}
    last = max((more for tokens, more in padded_to.items() if more > tokens), default=0)
    return tuple(sorted({more for more in padded_to.values() if more <= last}))


def chain_pass_timer(runner: ChainRunner) -> CachedPassTimer:
    """Times the passes of a model with recurrent states: all rows have equally many tokens: one segment."""

    def begin(rows: Sequence[object]) -> None:
        """One token allocates all buffers and states."""
        runner.forward(rows, [Entries.chain([0]) for _ in rows])
        runner.commit(rows, [[0] for _ in rows])

    return CachedPassTimer(runner, begin=begin)


class ExitPassTimer:
    """Times the passes of one block of a sorted draft over new entries, and of the head that reads its exit."""

    def __init__(self, lm: ModelRunner | LeadingRunner, block: int) -> None:
        self.lm = lm
        self.block = block
        self.buckets, self.device = lm.buckets, lm.device
        self.max_positions = max_positions(lm.model.config.get_text_config())
        self._timed = TimedRows(lm, self._begin)
        self.place, self.close = self._timed.open, self._timed.close

    def _begin(self, rows: Sequence[object]) -> None:
        """One token through every block allocates all buffers."""
        self.lm.prefill(rows, [[0]] * len(rows), blocks=len(self.lm.exits))

    def run(self, tokens: int) -> None:
        rows = self._timed.rows
        if self.block == 0:
            states = self.lm.enter(rows, self._timed.entries(tokens))
        else:
            for row in rows:
                self.lm.place_uncommitted(row, tokens, self.block)
            states = self.lm.deepen(rows, self.block, [list(range(tokens)) for _ in rows])
        self._timed.finish(self.lm.logits(torch.cat(states)))
