"""A causal LM with a preallocated tree cache: per row its context, once, and an uncommitted tree behind it.

Rows are left-aligned: the committed token at position t is in slot t, followed by the uncommitted entries (pending
tokens and tree nodes that were run but not yet committed). A forward pass writes its keys and values once; a commit
moves the kept entries up to the committed end. Nothing is concatenated, and no context is copied per draft.

Masks and windows come from positions, never from slots; a padding query attends to itself only, so it gives no NaN.
Target and draft model both run through this class.

Legend: B rows, Q queries (padded), S slots, H heads, D head size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from draftsmith.infer.costs.pass_costs import padded
from draftsmith.infer.models.masks import MaskPlan

GROWTH = 256
PREFILL_CHUNK = 512


class TreeCache:
    """The cache that transformers' attention layers write to and read from.

    `begin` sets the rows and slots of the next pass. Buffers take the shape of the first keys and values, not of the
    config, so grouped, multi-query and unequal heads all fit. `states`: hidden states that are stored and moved with
    them, [B, S, D] each.
    """

    is_compileable = False

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.states: list[torch.Tensor] = []
        self.rows = 0
        self.slots = 0
        self.grown = 0
        self._first = 0
        self._count = 0
        self._end = 0
        self._start = -1
        self._slots_BQ: torch.Tensor | None = None
        self._index_B1: torch.Tensor | None = None

    def begin(self, first: int, slots_BQ: np.ndarray, device: torch.device) -> None:
        """The next pass writes these slots, of the rows from `first` on."""
        self._first, self._count = first, len(slots_BQ)
        self._end = int(slots_BQ.max()) + 1
        start = int(slots_BQ[0, 0])
        if (slots_BQ == start + np.arange(slots_BQ.shape[1])).all():
            self._start = start  # a slice, which is faster than an index
            return
        self._start = -1
        self._slots_BQ = torch.from_numpy(slots_BQ).to(device)
        self._index_B1 = torch.arange(first, first + self._count, device=device)[:, None]

    def put_states(self, layer: int, states_BQD: torch.Tensor) -> None:
        """Store hidden states in the slots of the current pass."""
        assert layer <= len(self.states)
        if layer == len(self.states):
            self.states.append(states_BQD.new_zeros((self.rows, self.slots, states_BQD.shape[-1])))
        self._write(self.states[layer], states_BQD)

    def states_of(self, layer: int) -> torch.Tensor:
        """[B, Q, D] the hidden states in the slots of the current pass."""
        if self._start >= 0:
            return self.states[layer][self._first : self._first + self._count, self._start : self._end]
        return self.states[layer][self._index_B1, self._slots_BQ]

    def _write(self, buffer_BS: torch.Tensor, new_BQ: torch.Tensor) -> None:
        if self._start >= 0:
            buffer_BS[self._first : self._first + self._count, self._start : self._end] = new_BQ
        else:
            buffer_BS[self._index_B1, self._slots_BQ] = new_BQ

    @torch.inference_mode()
    def reserve(self, rows: int, slots: int) -> None:
        """Grow to at least this many rows and slots, keeping what is stored."""
        if rows <= self.rows and slots <= self.slots:
            return
        self.rows = max(rows, self.rows)
        if slots > self.slots:
            self.slots = max(slots, self.slots + GROWTH)
        self.grown += bool(self.keys)
        for buffers in (self.keys, self.values, self.states):
            for layer, old_BSHD in enumerate(buffers):
                new_BSHD = old_BSHD.new_zeros((self.rows, self.slots, *old_BSHD.shape[2:]))
                new_BSHD[: old_BSHD.shape[0], : old_BSHD.shape[1]] = old_BSHD
                buffers[layer] = new_BSHD

    def update(
        self, key_BHQD: torch.Tensor, value_BHQD: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one layer's new entries; return its keys and values up to the last slot in use."""
        if layer_idx == len(self.keys):
            for buffers, new in ((self.keys, key_BHQD), (self.values, value_BHQD)):
                buffers.append(new.new_zeros((self.rows, self.slots, new.shape[1], new.shape[3])))
        last = self._first + self._count
        shown = []
        for buffer_BSHD, new_BHQD in ((self.keys[layer_idx], key_BHQD), (self.values[layer_idx], value_BHQD)):
            self._write(buffer_BSHD, new_BHQD.transpose(1, 2))
            shown.append(buffer_BSHD[self._first : last, : self._end].transpose(1, 2))
        return shown[0], shown[1]

    @torch.inference_mode()
    def keep(self, row: int, start: int, sources: list[int]) -> None:
        """Move the entries in slots `sources` of a row, in order, to the slots from `start` on."""
        if sources == list(range(start, start + len(sources))):
            return
        where = torch.tensor(sources, device=self.keys[0].device)
        for buffers in (self.keys, self.values, self.states):
            for buffer_BSHD in buffers:
                buffer_BSHD[row, start : start + len(sources)] = buffer_BSHD[row].index_select(0, where)

    @torch.inference_mode()
    def move_row(self, source: int, target: int, used: int) -> None:
        """Copy the first `used` slots of row `source` to row `target`."""
        for buffers in (self.keys, self.values, self.states):
            for buffer_BSHD in buffers:
                buffer_BSHD[target, :used] = buffer_BSHD[source, :used]

    def nbytes(self) -> int:
        return sum(t.nbytes for buffers in (self.keys, self.values) for t in buffers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._end


@dataclass(slots=True)
class Slot:
    """One row's state: committed length, and its uncommitted entries with positions and ancestors (bit masks)."""

    index: int
    length: int = 0
    positions: list[int] = field(default_factory=list)
    visible: list[int] = field(default_factory=list)

    @property
    def uncommitted(self) -> int:
        return len(self.positions)

    @property
    def used(self) -> int:
        return self.length + len(self.positions)

    def append(self, parents: Sequence[int]) -> None:
        """Add uncommitted entries with these parents (see Entries)."""
        for parent in parents:
            seen = self.visible[parent] if parent >= 0 else 0
            self.positions.append(self.length if parent < 0 else self.positions[parent] + 1)
            self.visible.append(seen | (1 << len(self.visible)))


@dataclass(slots=True)
class Entries:
    """Tokens that a forward pass appends to one row, each with its parent.

    `parents[i]` is an index among the row's uncommitted entries, counted from the last commit (earlier passes, or
    earlier in this list), or -1: directly behind the committed tokens.
    """

    tokens: list[int]
    parents: list[int]

    @classmethod
    def chain(cls, tokens: list[int], uncommitted: int = 0) -> Entries:
        """A chain below the newest of `uncommitted` entries."""
        return cls(tokens, list(range(uncommitted - 1, uncommitted - 1 + len(tokens))))


def liked_buckets(device: torch.device, dtype: torch.dtype) -> tuple[int, ...]:
    """Numbers of queries that are worth padding to on this device.

    On a CPU in half precision, torch's attention takes two to four times as long for one query as for two, and its
    matrix products are no faster for one row than for two.
    """
    return (2,) if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) else ()


def weight_bytes(model: Any) -> int:
    """Bytes of weights that a pass reads: all, except an input embedding that is not shared with the head."""
    head = model.get_output_embeddings()
    table = model.get_input_embeddings().weight
    total = sum(parameter.nbytes for parameter in model.parameters())
    return total if head is None or getattr(head, "weight", None) is table else total - table.nbytes


class CachedLM:
    """A causal LM and its tree cache. Rows are identified by objects of the caller's."""

    def __init__(self, model: Any, mask_plan: MaskPlan, buckets: tuple[int, ...] | None = None) -> None:
        self.model = model
        self.cache = TreeCache()
        self.forward_seconds = 0.0
        self.bytes_moved = 0
        self.weight_bytes = weight_bytes(model)
        self._plan = mask_plan
        self._slots: dict[Any, Slot] = {}
        self._order: list[Any] = []
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.buckets = liked_buckets(self.device, self.dtype) if buckets is None else buckets

    # rows

    def open(self, row: Any, room: int) -> None:
        """Add a row that will need `room` slots in all."""
        assert row not in self._slots, "row is open already"
        self._slots[row] = Slot(len(self._order))
        self._order.append(row)
        self.cache.reserve(len(self._order), room)

    def close(self, row: Any) -> None:
        """Remove a row; the last row takes its place, so that live rows stay contiguous."""
        slot = self._slots.pop(row)
        last = self._order.pop()
        if last is not row:
            moved = self._slots[last]
            self.cache.move_row(moved.index, slot.index, moved.used)
            moved.index = slot.index
            self._order[slot.index] = last

    def has(self, row: Any) -> bool:
        return row in self._slots

    def length(self, row: Any) -> int:
        """The number of the row's tokens that are committed to the cache."""
        return self._slots[row].length

    def uncommitted(self, row: Any) -> int:
        return self._slots[row].uncommitted

    # passes

    @torch.inference_mode()
    def forward(
        self, rows: Sequence[Any], entries: Sequence[Entries], hidden: bool = False, last_only: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Run new `entries` of `rows`: logits [B, Q, V] in `rows`' order, right-padded, and hidden states if asked.

        `last_only`: only the logits of the last padded query, for passes that just fill the cache.
        """
        slots = [self._slots[row] for row in rows]
        first = min(slot.index for slot in slots)
        span = self._order[first : max(slot.index for slot in slots) + 1]
        place = {id(slot): entry for slot, entry in zip(slots, entries)}
        width = padded(max(len(entry.tokens) for entry in entries), self.buckets)
        spanned = [self._slots[row] for row in span]
        slots_BQ = np.array([slot.used for slot in spanned])[:, None] + np.arange(width)
        self.cache.reserve(len(self._order), int(slots_BQ.max()) + 1)
        tokens_BQ = np.zeros((len(span), width), dtype=np.int64)
        positions_BQ = np.zeros((len(span), width), dtype=np.int64)
        chosen = []
        for b, slot in enumerate(spanned):
            entry = place.get(id(slot), Entries([], []))
            count = len(entry.tokens)
            slot.append(entry.parents)
            tokens_BQ[b, :count] = entry.tokens
            positions_BQ[b, :count] = slot.positions[slot.uncommitted - count :]
            chosen.append(slots_BQ[b, :count].tolist())
        self.cache.begin(first, slots_BQ, self.device)
        mask = self._plan.build(spanned, chosen, slots_BQ, positions_BQ, self.device, self.dtype)
        ran = time.perf_counter()
        output = self.model(
            input_ids=torch.from_numpy(tokens_BQ).to(self.device),
            position_ids=torch.from_numpy(positions_BQ).to(self.device),
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1 if last_only else 0,
            output_hidden_states=hidden,
        )
        logits_BQV, states = output.logits, tuple(output.hidden_states) if hidden else ()
        order = [slot.index - first for slot in slots]
        if order != list(range(len(span))):
            logits_BQV = logits_BQV[order]
            states = tuple(state[order] for state in states)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.forward_seconds += time.perf_counter() - ran
        self.bytes_moved += self.weight_bytes
        return logits_BQV, states

    def prefill(
        self, rows: Sequence[Any], tokens: Sequence[list[int]], hidden: bool = False
    ) -> list[list[tuple[torch.Tensor, ...]]]:
        """Run `tokens` of each row into the cache in chunks; hidden states per row and chunk if asked."""
        states: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in rows]
        offset = 0
        while any(len(tokens_T) > offset for tokens_T in tokens):
            live = [i for i, tokens_T in enumerate(tokens) if len(tokens_T) > offset]
            parts = [tokens[i][offset : offset + PREFILL_CHUNK] for i in live]
            chosen = [rows[i] for i in live]
            _, layers = self.forward(chosen, [Entries.chain(part) for part in parts], hidden=hidden, last_only=True)
            for b, i in enumerate(live):
                states[i].append(tuple(layer[b, : len(parts[b])] for layer in layers))
                self.commit(rows[i], list(range(len(parts[b]))))
            offset += PREFILL_CHUNK
        return states

    def commit(self, row: Any, kept: list[int]) -> None:
        """Keep the uncommitted entries at `kept` (a path, in order) and drop the rest."""
        slot = self._slots[row]
        self.cache.keep(slot.index, slot.length, [slot.length + i for i in kept])
        slot.length += len(kept)
        slot.positions.clear()
        slot.visible.clear()

    def drop(self, row: Any, at_most: int) -> None:
        """Throw the uncommitted entries away, and committed ones from position `at_most` on."""
        slot = self._slots[row]
        slot.length = min(slot.length, at_most)
        slot.positions.clear()
        slot.visible.clear()
