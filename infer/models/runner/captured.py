"""Passes of few tokens as CUDA graphs: one graph for each number of tokens and of slots, replayed with new inputs.

A pass of a small batch is mostly the launching of kernels. A graph launches them all at once; its shapes and addresses
are fixed, so tokens are padded to a bucket, attention reads all slots up to a power of two (static_reads.py), and what
differs from pass to pass goes into one buffer, in one upload. Graphs last as long as the arena's buffers.

On the CPU the same static passes run uncaptured, which is how they are tested. No part of this file has run on a CUDA
device yet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from draftsmith.infer.costs.pass_costs import padded
from draftsmith.infer.models.runner.arena import LASTING_SLOTS, Arena
from draftsmith.infer.models.runner.attention import running
from draftsmith.infer.models.runner.entries import PassOutput
from draftsmith.infer.models.runner.pass_inputs import ChosenEntries, PassPlan
from draftsmith.infer.models.runner.static_reads import StaticInputs, StaticReads, StaticShape, last_slot, static_parts
from draftsmith.infer.models.runner.taps import Taps
from draftsmith.infer.models.runner.transfers import Transfers

log = logging.getLogger(__name__)

# Numbers of tokens that passes are padded to. Those of more tokens, or of more pairs of a token and a slot, are run row
# by row, without a graph. The limit of pairs is a guess.
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PAIRS = 1 << 21
# Entries that one commit moves in a graph, at most.
MOVES = 64

# What a pass gives: logits [N, V], and states [N, D] by name.
Outputs = tuple[torch.Tensor, dict[str, torch.Tensor]]


@dataclass(slots=True)
class _Captured:
    """A pass or a move at fixed addresses: `run` reads `buffer` and, once captured, leaves `outputs`."""

    buffer: torch.Tensor
    run: Callable[[], Any]
    outputs: Any = None


class CapturedPasses:
    """The static passes of one model. `refusal` says why they cannot be captured, once that was tried."""

    def __init__(self, model: Any, plan: PassPlan, cache: Arena, taps: Taps, transfers: Transfers) -> None:
        self.refusal = ""
        self._model = model
        self._plan = plan
        self._cache = cache
        self._taps = taps
        self._transfers = transfers
        self._windows = list(dict.fromkeys(plan.masks.windows.values()))
        self._captured: dict[Any, _Captured] = {}
        self._generation = -1
        self._pool: Any = None

    def __len__(self) -> int:
        """The number of passes that are held."""
        return len(self._captured)

    def run(self, entries: ChosenEntries, taps: Sequence[str], keep: Sequence[int]) -> PassOutput | None:
        """Run `entries`; logits at the places `keep`. None if they are not run with static shapes: nor is a pass that
        gives no logits, because nothing would show that a value of another row, which is not finite, has spread."""
        count = len(entries.slots)
        if not keep or self.refusal or count > TOKENS[-1] or entries.states is not None or not self._cache.keys:
            return None
        shape = StaticShape(padded(count, TOKENS), slots_read(last_slot(entries)))
        parts = static_parts(entries, keep, shape, self._windows)
        if parts is None or shape.tokens * shape.slots > PAIRS:
            return None
        size = StaticInputs.size(shape, len(self._windows))
        names = tuple(dict.fromkeys(taps))
        captured = self._at((shape, names), size, lambda buffer: self._pass(buffer, shape, names))
        if captured is None:
            return None
        self._transfers.up_into(captured.buffer, *parts)
        logits_NV, states = self._replay(captured)
        inputs = StaticInputs.of(captured.buffer, shape, len(self._windows))
        # Copies: the next replay writes to the same addresses.
        kept_NV = logits_NV.index_select(0, inputs.keep_N[: len(keep)])
        return PassOutput(kept_NV, {name: states[name][:count].clone() for name in taps})

    def spare_moves(self, moves: int) -> int:
        """How many moves from slot 0 to slot 0 fill up these for `move`; 0 if it takes no such number."""
        return MOVES - moves if 0 < moves < MOVES and not self.refusal and self._cache.keys else 0

    def move(self, from_N: torch.Tensor, to_N: torch.Tensor) -> bool:
        """The arena's move, of MOVES entries. False if it could not be captured, and nothing was done."""

        def made(buffer: torch.Tensor) -> Callable[[], None]:
            sources, targets = buffer.view(2, MOVES)
            return lambda: self._cache.move(sources, targets)

        captured = self._at("move", 2 * MOVES, made)
        if captured is None:
            return False
        torch.cat([from_N, to_N], out=captured.buffer)
        self._replay(captured)
        return True

    def _at(self, key: Any, size: int, make: Callable[[torch.Tensor], Callable[[], Any]]) -> _Captured | None:
        """What is captured under `key`, or a new one with a buffer for `size` numbers; None if it cannot be captured.

        It is captured while the buffer is all zeros, so what runs then touches slot 0 only, which belongs to no row."""
        if self._generation != self._cache.generation:  # the arena's buffers lie elsewhere now
            self._captured.clear()
            self._generation = self._cache.generation
        if key not in self._captured:
            buffer = torch.zeros(size, dtype=torch.long, device=self._plan.device)
            captured = _Captured(buffer, make(buffer))
            if self._on_device():
                try:
                    captured.run, captured.outputs = self._capture(captured.run)
                except (RuntimeError, NotImplementedError, TypeError, ValueError) as problem:
                    self.refuse(str(problem).partition("\n")[0])
                    return None
            self._captured[key] = captured
        return self._captured[key]

    def _pass(self, buffer: torch.Tensor, shape: StaticShape, taps: tuple[str, ...]) -> Callable[[], Outputs]:
        """A static pass over what `buffer` says."""
        inputs = StaticInputs.of(buffer, shape, len(self._windows))

        def run() -> Outputs:
            reads = StaticReads(inputs, shape, self._plan.masks.windows, self._plan.marks)
            self._cache.begin(0, shape.tokens, inputs.slots_N)
            with self._taps.taking(taps) as taken, running(reads, self._plan.configs):
                output = self._model(
                    input_ids=inputs.tokens_N[None],
                    position_ids=inputs.positions_N[None],
                    attention_mask=self._plan.handed(self._plan.marks),
                    past_key_values=self._cache,
                    use_cache=True,
                )
                return output.logits[0], {name: taken[name][0] for name in taps}

        return run

    def _replay(self, captured: _Captured) -> Any:
        if not self._on_device():
            return self.outside(captured.run)
        captured.run()
        return captured.outputs

    def _on_device(self) -> bool:
        return self._plan.device.type == "cuda"

    def outside(self, run: Callable[[], Any]) -> Any:
        """Run what would be captured on a CUDA device."""
        return run()

    def refuse(self, reason: str) -> None:
        """Run eagerly from now on, and say so once."""
        self.refusal = reason
        self._captured.clear()
        log.warning("%s: passes run without CUDA graphs: %s", self._model.config.model_type, reason)

    def _capture(self, run: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
        """A graph's replay, and where it leaves its outputs. All graphs share one pool of memory: each one's outputs
        are copied before another is replayed."""
        device = self._plan.device
        with torch.cuda.device(device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            aside = torch.cuda.Stream(device)
            aside.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(aside):
                run()  # libraries allocate their workspaces in a first call, which must not be captured
            torch.cuda.current_stream(device).wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = run()
        return graph.replay, outputs


def slots_read(slots: int) -> int:
    """The power of two up to which a pass reads that needs the first `slots` slots."""
    return max(LASTING_SLOTS, 1 << (slots - 1).bit_length())
