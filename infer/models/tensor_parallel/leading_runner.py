"""The runner of a sharded target or draft on rank 0: it runs every verb itself and sends it to the others' runners.

Verbs that no other rank need wait for (rows that join and leave, commits) travel with the next pass, so a step costs
one message. Rows and models go by numbers there.

Legend: N tokens of a pass, V vocabulary, D hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from draftsmith.infer.models.runner.entries import Entries, PassOutput
from draftsmith.infer.models.runner.model_runner import ModelRunner, OnLogits
from draftsmith.infer.models.runner.taps import Taps
from draftsmith.infer.models.runner.transfers import Transfers
from draftsmith.infer.models.tensor_parallel.ranks import Ranks, interrupts_wait

# A verb and its arguments.
Verb = tuple[str, tuple[Any, ...]]
END_VERB = "end"
# The last message: for the target, as every message is for one model.
END: tuple[int, list[Verb]] = (0, [(END_VERB, ())])


class LeadingRunner:
    """`own` with its counterparts on the other ranks. What is not a verb is the own runner's: all ranks have the same
    rows, lengths and slots. `number`: of the model, among those that the ranks hold."""

    def __init__(self, own: ModelRunner, ranks: Ranks, number: int) -> None:
        self.own, self.ranks, self.number = own, ranks, number
        self.model: Any = own.model
        self.buckets, self.device, self.dtype = own.buckets, own.device, own.dtype
        self.weight_bytes = own.weight_bytes
        self.exits = own.exits
        self.taps: Taps = own.taps
        self.transfers: Transfers = own.transfers
        self._numbers: dict[Any, int] = {}
        self._made = 0
        self._unsent: list[Verb] = []
        lead_calls(self)

    @property
    def forward_seconds(self) -> float:
        return self.own.forward_seconds

    @property
    def bytes_moved(self) -> int:
        return self.own.bytes_moved

    def has(self, row: Any) -> bool:
        return self.own.has(row)

    def length(self, row: Any) -> int:
        return self.own.length(row)

    def uncommitted(self, row: Any) -> int:
        return self.own.uncommitted(row)

    @property
    def block_bytes(self) -> list[int]:
        return self.own.block_bytes

    @property
    def head_bytes(self) -> int:
        return self.own.head_bytes

    def behind(self, row: Any, block: int, wanted: Sequence[int]) -> int:
        return self.own.behind(row, block, wanted)

    def logits(self, states_ND: torch.Tensor) -> torch.Tensor:
        """Of an exit: norm and head are whole on every rank."""
        return self.own.logits(states_ND)

    # verbs that each rank carries out by itself

    def open(self, row: Any, room: int = 0) -> None:
        with interrupts_wait():
            self.own.open(row, room)
            self._later("open", self._number(row), room)

    def fork(self, source: Any, row: Any, tokens: int, room: int = 0) -> None:
        with interrupts_wait():
            self.own.fork(source, row, tokens, room)
            self._later("fork", self._numbers[source], self._number(row), tokens, room)

    def close(self, row: Any) -> None:
        with interrupts_wait():
            self.own.close(row)
            self._later("close", self._numbers.pop(row))

    def drop(self, rows: Sequence[Any]) -> None:
        with interrupts_wait():
            self.own.drop(rows)
            self._later("drop", self._several(rows))

    def shorten(self, row: Any, length: int) -> None:
        with interrupts_wait():
            self.own.shorten(row, length)
            self._later("shorten", self._numbers[row], length)

    def place(self, rows: Sequence[Any], context: int) -> None:
        with interrupts_wait():
            self.own.place(rows, context)
            self._later("place", self._several(rows), context)

    def place_uncommitted(self, row: Any, tokens: int, block: int) -> None:
        with interrupts_wait():
            self.own.place_uncommitted(row, tokens, block)
            self._later("place_uncommitted", self._numbers[row], tokens, block)

    def commit(self, rows: Sequence[Any], kept: Sequence[Sequence[int]], picks: Sequence[int] = ()) -> torch.Tensor:
        with interrupts_wait():
            picks_N = self.own.commit(rows, kept, picks)
            self._later("commit", self._several(rows), [list(path) for path in kept])
        return picks_N

    # verbs that need all ranks at once

    def forward(
        self,
        rows: Sequence[Any],
        entries: Sequence[Entries],
        taps: Sequence[str] = (),
        wanted: Sequence[int] | None = None,
        eagerly: bool = False,
    ) -> PassOutput:
        with self.ranks.together(_count(entries)):
            self._send("forward", self._several(rows), _plain(entries), None if wanted is None else list(wanted))
            return self.own.forward(rows, entries, taps, wanted, eagerly)

    def enter(self, rows: Sequence[Any], entries: Sequence[Entries]) -> list[torch.Tensor]:
        with self.ranks.together(_count(entries)):
            self._send("enter", self._several(rows), _plain(entries))
            return self.own.enter(rows, entries)

    def deepen(self, rows: Sequence[Any], block: int, wanted: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        tokens = sum(self.own.behind(row, block, some) for row, some in zip(rows, wanted))
        with self.ranks.together(tokens):
            self._send("deepen", self._several(rows), block, [list(some) for some in wanted])
            return self.own.deepen(rows, block, wanted)

    def prefill(
        self,
        rows: Sequence[Any],
        tokens: Sequence[list[int]],
        taps: Sequence[str] = (),
        blocks: int = 1,
        on_logits: OnLogits | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        if not any(tokens):
            return self.own.prefill(rows, tokens, taps, blocks, on_logits)
        with self.ranks.together(sum(map(len, tokens))):
            self._send("prefill", self._several(rows), list(tokens), blocks, on_logits is not None)
            return self.own.prefill(rows, tokens, taps, blocks, on_logits)

    # messages

    def _number(self, row: Any) -> int:
        self._made += 1
        self._numbers[row] = self._made
        return self._made

    def _several(self, rows: Sequence[Any]) -> list[int]:
        return [self._numbers[row] for row in rows]

    def _later(self, verb: str, *given: Any) -> None:
        self._unsent.append((verb, given))

    def _send(self, verb: str, *given: Any) -> None:
        unsent, self._unsent = self._unsent, []
        self.ranks.send((self.number, [*unsent, (verb, given)]))

    def call(self, run: Any, *args: Any, **named: Any) -> Any:
        """The model itself, called from outside the runner (to check its parts, say): all ranks call it."""
        if self.ranks.inside:
            return run(*args, **named)
        plain = (torch.Tensor, int, float, str, type(None))
        if not all(isinstance(value, plain) for value in (*args, *named.values())):
            raise ValueError("a target over several ranks cannot be called with a cache of keys and values: --tp 1 can")
        with self.ranks.together():
            self._send("call", *[_on_cpu(value) for value in args], {key: _on_cpu(one) for key, one in named.items()})
            with torch.no_grad():  # the shares are not trained
                return run(*args, **named)


def lead_calls(leading: LeadingRunner) -> None:
    """Let a call of the model on rank 0 call it on all ranks."""
    run = leading.model.forward
    leading.model.forward = functools.wraps(run)(functools.partial(leading.call, run))


def _plain(entries: Sequence[Entries]) -> list[tuple[list[int], list[int]]]:
    assert all(entry.states is None for entry in entries), "models over ranks read tokens"
    return [(entry.tokens, entry.parents) for entry in entries]


def _count(entries: Sequence[Entries]) -> int:
    return sum(len(entry.tokens) for entry in entries)


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) else value
