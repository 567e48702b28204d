"""A causal LM with exits after some of its layers, and one cache for all of them.

The layers between two exits are a block. New entries go through the first block; the caller may then run some of them
through the next one. The states in which entries left a block are kept beside the cache, so that a deeper block can run
later what it has not seen: when an entry goes deeper, everything that it attends to goes first. So along a path, the
entries that a block has seen are always a prefix of it.

Rows may leave at different blocks, and so may nodes of one row; infer/drafters/exit_choice.py decides which go deeper.

Legend: B rows, Q queries (padded), N wanted entries, D hidden, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from draftsmith.infer.costs.pass_costs import padded
from draftsmith.infer.models.cached_lm import PREFILL_CHUNK, Entries, Slot, TreeCache, liked_buckets
from draftsmith.infer.models.layers import ModelParts, check_parts, find_parts, inner_block
from draftsmith.infer.models.masks import MaskPlan


@dataclass(slots=True)
class ExitSlot(Slot):
    """A row's state. `filled[j]`: the number of committed entries that block j has seen; `passed[i]`: the number of
    blocks that have seen uncommitted entry i."""

    filled: list[int] = field(default_factory=list)
    passed: list[int] = field(default_factory=list)


class ExitLM:
    """`exits`: numbers of layers, ascending; the last one is the whole model. `eager`: run every entry through every
    block at once, which is slower and gives the same numbers."""

    def __init__(
        self,
        model: Any,
        exits: Sequence[int],
        mask_plan: MaskPlan,
        buckets: tuple[int, ...] | None = None,
        eager: bool = False,
    ) -> None:
        parts = find_parts(model)
        check_parts(model, parts)
        self.model = model
        self.exits = tuple(exits)
        self.eager = eager
        self.parts: ModelParts = parts
        self.blocks = [inner_block(model, start, end) for start, end in zip((0, *exits), exits)]
        self.block_bytes = [_bytes(parts.layers[start:end]) for start, end in zip((0, *exits), exits)]
        self.head_bytes = _bytes([parts.head, parts.norm])
        self.cache = TreeCache()
        self.forward_seconds = 0.0
        self.bytes_moved = 0
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.buckets = liked_buckets(self.device, self.dtype) if buckets is None else buckets
        self._plan = mask_plan
        self._slots: dict[Any, ExitSlot] = {}
        self._order: list[Any] = []

    # rows

    def open(self, row: Any, room: int) -> None:
        """Add a row that will need `room` slots in all."""
        assert row not in self._slots, "row is open already"
        self._slots[row] = ExitSlot(len(self._order), filled=[0] * len(self.blocks))
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

    def place(self, row: Any, context: int) -> None:
        """Pretend the row has `context` committed entries (timing only)."""
        slot = self._slots[row]
        slot.length, slot.filled = context, [context] * len(self.blocks)

    def place_uncommitted(self, row: Any, tokens: int, block: int) -> None:
        """Pretend a chain of `tokens` entries has reached `block` (timing only)."""
        slot = self._slots[row]
        slot.positions = [slot.length + i for i in range(tokens)]
        slot.visible = [(1 << (i + 1)) - 1 for i in range(tokens)]
        slot.passed = [block] * tokens

    def behind(self, row: Any, block: int, wanted: Sequence[int]) -> int:
        """The number of entries that `block` would have to run for the uncommitted entries `wanted`, these included."""
        return len(self._missing(self._slots[row], block, wanted))

    # passes

    def enter(self, rows: Sequence[Any], entries: Sequence[Entries]) -> list[torch.Tensor]:
        """Run new entries through the first block; per row, the states [N, D] in which they left it."""
        for row, entry in zip(rows, entries):
            self._slots[row].append(entry.parents)
            self._slots[row].passed += [0] * len(entry.parents)
        new = [
            list(range(self.uncommitted(row) - len(entry.tokens), self.uncommitted(row)))
            for row, entry in zip(rows, entries)
        ]
        states = self._run(rows, 0, new, [entry.tokens for entry in entries])
        if self.eager:
            for block in range(1, len(self.blocks)):
                self._run(rows, block, new)
        return states

    def deepen(self, rows: Sequence[Any], block: int, wanted: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Run uncommitted entries through `block`, after those they attend to that it has not seen; their states."""
        if self.eager:
            slots = [self._slots[row] for row in rows]
            states_BSD = self.cache.states[block]
            return [states_BSD[slot.index, [slot.length + i for i in some]] for slot, some in zip(slots, wanted)]
        return self._run(rows, block, wanted)

    @torch.inference_mode()
    def logits(self, states_ND: torch.Tensor) -> torch.Tensor:
        """[N, V] the logits of an exit in these states."""
        ran = time.perf_counter()
        logits_NV = self.parts.logits(states_ND)
        self._ran(ran, self.head_bytes)
        return logits_NV

    def prefill(self, rows: Sequence[Any], tokens: Sequence[list[int]], blocks: int) -> None:
        """Run `tokens` of each row through the first `blocks` blocks, in chunks, and commit them."""
        offset = 0
        while any(len(tokens_T) > offset for tokens_T in tokens):
            live = [i for i, tokens_T in enumerate(tokens) if len(tokens_T) > offset]
            parts = [tokens[i][offset : offset + PREFILL_CHUNK] for i in live]
            chosen = [rows[i] for i in live]
            self.enter(chosen, [Entries.chain(part) for part in parts])
            for block in range(1, 1 if self.eager else blocks):
                self._run(chosen, block, [list(range(len(part))) for part in parts])
            for row, part in zip(chosen, parts):
                self.commit(row, list(range(len(part))))
            offset += PREFILL_CHUNK

    def commit(self, row: Any, kept: list[int]) -> None:
        """Keep the uncommitted entries at `kept` (a path, in order) and drop the rest."""
        slot = self._slots[row]
        self.cache.keep(slot.index, slot.length, [slot.length + i for i in kept])
        for block in range(len(self.blocks)):
            if slot.filled[block] == slot.length:
                seen = [slot.passed[i] > block for i in kept]
                slot.filled[block] += seen.index(False) if False in seen else len(seen)
        slot.length += len(kept)
        slot.positions.clear()
        slot.visible.clear()
        slot.passed.clear()

    def drop(self, row: Any, at_most: int) -> None:
        """Throw the uncommitted entries away, and committed ones from position `at_most` on."""
        slot = self._slots[row]
        slot.length = min(slot.length, at_most)
        slot.filled = [min(filled, slot.length) for filled in slot.filled]
        slot.positions.clear()
        slot.visible.clear()
        slot.passed.clear()

    @torch.inference_mode()
    def _run(
        self,
        rows: Sequence[Any],
        block: int,
        wanted: Sequence[Sequence[int]],
        tokens: Sequence[list[int]] | None = None,
    ) -> list[torch.Tensor]:
        """Run a block, in chunks, over the wanted uncommitted entries and all that it has not seen of their context."""
        missing = [self._missing(self._slots[row], block, some) for row, some in zip(rows, wanted)]
        states_BQD = [torch.empty(0)] * len(rows)
        for start in range(0, max(len(one) for one in missing), PREFILL_CHUNK):
            live = [i for i, one in enumerate(missing) if len(one) > start]
            parts = [missing[i][start : start + PREFILL_CHUNK] for i in live]
            given = None if tokens is None else [tokens[i][start : start + PREFILL_CHUNK] for i in live]
            found = self._pass([self._slots[rows[i]] for i in live], block, parts, given)
            for i, part, some in zip(live, parts, found):
                states_BQD[i] = some if start == 0 else torch.cat([states_BQD[i], some])
                for at in part:
                    self._mark(self._slots[rows[i]], block, at)
        picked = []
        for row, one, asked, states_QD in zip(rows, missing, wanted, states_BQD):
            place = {at: n for n, at in enumerate(one)}
            length = self._slots[row].length
            picked.append(states_QD[[place[length + entry] for entry in asked]])
        return picked

    def _missing(self, slot: ExitSlot, block: int, wanted: Sequence[int]) -> list[int]:
        """The slots that `block` has not seen among committed entries, the wanted ones and their ancestors."""
        seen = 0
        for entry in wanted:
            seen |= slot.visible[entry]
        behind = [i for i in range(slot.uncommitted) if seen >> i & 1 and slot.passed[i] <= block]
        return [*range(slot.filled[block], slot.length), *(slot.length + i for i in behind)]

    def _mark(self, slot: ExitSlot, block: int, at: int) -> None:
        if at < slot.length:
            slot.filled[block] = at + 1
        else:
            assert slot.passed[at - slot.length] == block, "an entry skipped a block"
            slot.passed[at - slot.length] = block + 1

    def _pass(
        self,
        slots: Sequence[ExitSlot],
        block: int,
        chosen: Sequence[list[int]],
        tokens: Sequence[list[int]] | None,
    ) -> list[torch.Tensor]:
        """Run `block` over the entries in slots `chosen`; their states [Q, D] per row."""
        first = min(slot.index for slot in slots)
        spanned = [self._slots[row] for row in self._order[first : max(slot.index for slot in slots) + 1]]
        place = {id(slot): n for n, slot in enumerate(slots)}
        asked = [chosen[place[id(slot)]] if id(slot) in place else [] for slot in spanned]
        width = padded(max(len(one) for one in asked), self.buckets)
        slots_BQ = np.empty((len(spanned), width), dtype=np.int64)
        positions_BQ = np.zeros((len(spanned), width), dtype=np.int64)
        tokens_BQ = np.zeros((len(spanned), width), dtype=np.int64)
        for b, (slot, some) in enumerate(zip(spanned, asked)):
            slots_BQ[b, : len(some)] = some
            slots_BQ[b, len(some) :] = slot.used + np.arange(width - len(some))
            positions_BQ[b, : len(some)] = [at if at < slot.length else slot.positions[at - slot.length] for at in some]
            if tokens is not None and id(slot) in place:
                tokens_BQ[b, : len(some)] = tokens[place[id(slot)]]
        self.cache.reserve(len(self._order), int(slots_BQ.max()) + 1)
        mask = self._plan.build(spanned, asked, slots_BQ, positions_BQ, self.device, self.dtype)
        self.cache.begin(first, slots_BQ, self.device)
        ran = time.perf_counter()
        states_BQD = self._forward(block, tokens_BQ, positions_BQ, mask)
        self._ran(ran, self.block_bytes[block])
        if self.eager or block + 1 < len(self.blocks):
            self.cache.put_states(block, states_BQD)
        return [states_BQD[slot.index - first, : len(some)] for slot, some in zip(slots, chosen)]

    def _forward(self, block: int, tokens_BQ: np.ndarray, positions_BQ: np.ndarray, mask: Any) -> torch.Tensor:
        """[B, Q, D] the states after a block. Its model embeds the tokens; in a later block the inlet ignores that."""
        inner = self.blocks[block]
        if inner.inlet is not None:
            inner.inlet.states = self.cache.states_of(block - 1)
        output = inner.model(
            input_ids=torch.from_numpy(tokens_BQ).to(self.device),
            position_ids=torch.from_numpy(positions_BQ).to(self.device),
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        )
        states_BQD: torch.Tensor = output.last_hidden_state
        return states_BQD

    def _ran(self, since: float, moved: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.forward_seconds += time.perf_counter() - since
        self.bytes_moved += moved


def _bytes(modules: Sequence[nn.Module] | nn.ModuleList) -> int:
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())
