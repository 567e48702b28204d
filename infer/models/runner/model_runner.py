"""The runner: a causal LM over an arena of slots, for targets, drafts and sorted drafts alike.

A pass is packed: the new tokens of all its rows lie behind one another, [1, N], without padding between them. Every row
has its committed tokens in the arena, once, and behind them an uncommitted tree (pending tokens and nodes that were run
but not kept yet). Keys and values are written once; a commit moves the kept entries of all rows up to their committed
ends. No context is copied, expanded or masked (attention.py, masks.py).

A sorted draft has blocks: the layers between two exits. New entries go through the first block; the caller may then run
some of them through the next. The states in which entries left a block are kept beside the cache, so a deeper block can
run later what it has not seen: when an entry goes deeper, everything that it attends to goes first, so along a path the
entries that a block has seen are always a prefix. A plain model is one block, with its head.

Legend: N tokens of a pass, n entries of a row, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from draftsmith.infer.costs.pass_costs import padded
from draftsmith.infer.models.layers import check_parts, find_parts, inner_block, parameter_bytes, weight_bytes
from draftsmith.infer.models.runner.arena import Arena, Region
from draftsmith.infer.models.runner.attention import PackedPass, RowReads, configs_of, dense_mask, running
from draftsmith.infer.models.runner.entries import Entries, PassOutput, RunnerRow
from draftsmith.infer.models.runner.masks import MaskPlan, pieces
from draftsmith.infer.models.runner.taps import Taps

PREFILL_CHUNK = 512


class ModelRunner:
    """`model` with its arena. Rows are identified by objects of the caller's.

    `exits`: numbers of layers, ascending, of a sorted draft; the last one is the whole model. `eager`: run every entry
    through every block at once, which is slower and gives the same numbers. `buckets`: numbers of tokens that a pass is
    padded to."""

    def __init__(
        self,
        model: Any,
        mask_plan: MaskPlan,
        buckets: Sequence[int] = (),
        exits: Sequence[int] = (),
        eager: bool = False,
    ) -> None:
        self.model = model
        self.exits = tuple(exits)
        self.eager = eager
        self.cache = Arena()
        self.taps = Taps(model)
        self.forward_seconds = 0.0
        self.bytes_moved = 0
        self.weight_bytes = weight_bytes(model)
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.buckets = tuple(buckets)
        self._plan = mask_plan
        self._rows: dict[Any, RunnerRow] = {}
        self._marks = {kind: torch.zeros((1, 1, 1, 1), device=self.device) for kind in mask_plan.windows}
        self._configs = configs_of(model)
        if exits:
            self.parts = find_parts(model)
            check_parts(model, self.parts)
            cuts = list(zip((0, *exits), exits))
            self.blocks = [inner_block(model, start, end) for start, end in cuts]
            self.block_bytes = [parameter_bytes(self.parts.layers[start:end]) for start, end in cuts]
            self.head_bytes = parameter_bytes([self.parts.head, self.parts.norm])
            known = {id(config) for config in self._configs}
            for block in self.blocks:
                self._configs += [one for one in configs_of(block.model) if id(one) not in known]

    # rows

    def open(self, row: Any, room: int = 0) -> None:
        """Add a row. `room`: slots that it is known to need, so that it need not be moved before."""
        assert row not in self._rows, "row is open already"
        own = self.cache.region()
        own.peak = room
        self._rows[row] = RunnerRow(own, filled=[0] * max(len(self.exits), 1))

    def fork(self, source: Any, row: Any, tokens: int, room: int = 0) -> None:
        """Add a row that begins with the first `tokens` committed tokens of `source`, which are held once for both."""
        from_row = self._rows[source]
        assert not from_row.positions
        assert tokens <= from_row.length
        self.open(row, max(room - tokens, 0))
        new = self._rows[row]
        if tokens > from_row.elsewhere:
            from_row.shared.append(self.cache.split(from_row.own, tokens - from_row.elsewhere))
        for region in list(from_row.shared):
            left = tokens - new.length
            if left <= 0:
                break
            head = region if region.size <= left else self._split_shared(region, left)
            head.users += 1
            new.shared.append(head)
            new.length += head.size
        new.filled = [min(seen, new.length) for seen in from_row.filled]

    def _split_shared(self, region: Region, at: int) -> Region:
        """Cut off the first `at` slots of a region that several rows read; each then reads both parts."""
        head = self.cache.split(region, at)
        head.users = region.users
        for held in self._rows.values():
            if region in held.shared:
                held.shared.insert(held.shared.index(region), head)
        return head

    def close(self, row: Any) -> None:
        """Remove a row."""
        gone = self._rows.pop(row)
        for region in (*gone.shared, gone.own):
            self.cache.release(region)

    def has(self, row: Any) -> bool:
        return row in self._rows

    def length(self, row: Any) -> int:
        """The number of the row's tokens that are committed to the cache."""
        return self._rows[row].length

    def uncommitted(self, row: Any) -> int:
        return len(self._rows[row].positions)

    def drop(self, rows: Sequence[Any]) -> None:
        """Drop the uncommitted entries of these rows."""
        for row in rows:
            self._rows[row].cut(0)

    def shorten(self, row: Any, length: int) -> None:
        """Drop the uncommitted entries of a row, and the committed ones beyond the first `length`."""
        held = self._rows[row]
        held.cut(0)
        held.length = min(held.length, length)
        held.filled = [min(seen, held.length) for seen in held.filled]

    def place(self, rows: Sequence[Any], context: int) -> None:
        """Pretend that these rows have `context` committed entries, which every block has seen (timing only)."""
        for row in rows:
            self._rows[row].length = context
            self._rows[row].filled = [context] * len(self._rows[row].filled)
        self.cache.ensure({self._rows[row].own: context for row in rows})

    def place_uncommitted(self, row: Any, tokens: int, block: int) -> None:
        """Pretend that a chain of `tokens` entries has reached `block` (timing only)."""
        held = self._rows[row]
        held.append(list(range(-1, tokens - 1)))
        held.passed = [block] * tokens
        self.cache.ensure({held.own: held.length + tokens})

    def commit(self, rows: Sequence[Any], kept: Sequence[Sequence[int]]) -> None:
        """Keep of each row the uncommitted entries at `kept` (a path, in order) and drop the rest."""
        sources: list[int] = []
        targets: list[int] = []
        for row, path in zip(rows, kept):
            held = self._rows[row]
            end = held.own.start + held.length - held.elsewhere
            for at, entry in enumerate(path):
                if entry != at:
                    sources.append(end + entry)
                    targets.append(end + at)
        self.cache.move(sources, targets)
        for row, path in zip(rows, kept):
            self._rows[row].keep(path)

    # passes through the whole model

    @torch.inference_mode()
    def forward(
        self,
        rows: Sequence[Any],
        entries: Sequence[Entries],
        taps: Sequence[str] = (),
        wanted: Sequence[int] | None = None,
    ) -> PassOutput:
        """Run new `entries` of `rows`. `wanted[b]`: of how many of row b's last entries to return the logits; None: of
        all. After an error the rows hold entries that `drop` removes."""
        assert not self.exits, "a sorted draft is run block by block"
        chosen = [self._rows[row].append(entry.parents) for row, entry in zip(rows, entries)]
        counts = [len(entry.tokens) for entry in entries]
        prepared = self._prepare(rows, chosen)
        total = prepared.tokens
        keep = _last(counts, wanted) if wanted is not None else list(range(sum(counts)))
        asked: Any = torch.tensor(keep, device=self.device) if 0 < len(keep) < total else int(not keep)
        ran = time.perf_counter()
        with self.taps.taking(taps) as taken, prepared.attending:
            output = self.model(
                **self._inputs(entries, prepared),
                attention_mask=prepared.mask,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=asked,
            )
            states = {name: taken[name][0, : sum(counts)] for name in taps}
        logits_NV = output.logits[0]
        if keep and logits_NV.shape[0] != len(keep):  # padding, or a model that returns them all
            logits_NV = logits_NV[keep]
        self._ran(ran, self.weight_bytes)
        for row in rows:
            self._rows[row].passed = [1] * len(self._rows[row].positions)
        return PassOutput(logits_NV[: len(keep)], states)

    def prefill(
        self, rows: Sequence[Any], tokens: Sequence[list[int]], taps: Sequence[str] = (), blocks: int = 1
    ) -> list[dict[str, torch.Tensor]]:
        """Run `tokens` of each row in chunks, through the first `blocks` blocks of a sorted draft, and commit them; the
        tapped states [n, D] of each row by name."""
        states: list[dict[str, list[torch.Tensor]]] = [{name: [] for name in taps} for _ in rows]
        offset = 0
        while any(len(own) > offset for own in tokens):
            live = [i for i, own in enumerate(tokens) if len(own) > offset]
            parts = [tokens[i][offset : offset + PREFILL_CHUNK] for i in live]
            chosen = [rows[i] for i in live]
            entries = [Entries.chain(part) for part in parts]
            if self.exits:
                self.enter(chosen, entries)
                for block in range(1, 1 if self.eager else blocks):
                    self._run(chosen, block, [self._newest(row, len(part)) for row, part in zip(chosen, parts)])
            else:
                output = self.forward(chosen, entries, taps, [0] * len(chosen))
                for name in taps:
                    for i, own in zip(live, output.taps[name].split([len(part) for part in parts])):
                        states[i][name].append(own)
            self.commit(chosen, [range(len(part)) for part in parts])
            offset += PREFILL_CHUNK
        return [{name: torch.cat(own) for name, own in found.items() if own} for found in states]

    # passes through blocks

    def enter(self, rows: Sequence[Any], entries: Sequence[Entries]) -> list[torch.Tensor]:
        """Run new entries through the first block; per row, the states [n, D] in which they left it."""
        new = [self._rows[row].append(entry.parents) for row, entry in zip(rows, entries)]
        states = self._run(rows, 0, new, [entry.tokens for entry in entries])
        if self.eager:
            for block in range(1, len(self.blocks)):
                self._run(rows, block, new)
        return states

    def deepen(self, rows: Sequence[Any], block: int, wanted: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Run uncommitted entries through `block`, after those they attend to that it has not seen; their states."""
        numbers = [[self._rows[row].length + i for i in some] for row, some in zip(rows, wanted)]
        if self.eager:
            states_SD = self.cache.states[block]
            return [states_SD[self._rows[row].slots().slots(some)] for row, some in zip(rows, numbers)]
        return self._run(rows, block, numbers)

    def behind(self, row: Any, block: int, wanted: Sequence[int]) -> int:
        """The number of entries that `block` would have to run for the uncommitted entries `wanted`, these included."""
        held = self._rows[row]
        return len(held.missing(block, [held.length + i for i in wanted]))

    @torch.inference_mode()
    def logits(self, states_ND: torch.Tensor) -> torch.Tensor:
        """[N, V] the logits of an exit in these states."""
        ran = time.perf_counter()
        logits_NV = self.parts.logits(states_ND)
        self._ran(ran, self.head_bytes)
        return logits_NV

    def _newest(self, row: Any, count: int) -> list[int]:
        end = self.length(row) + self.uncommitted(row)
        return list(range(end - count, end))

    @torch.inference_mode()
    def _run(
        self,
        rows: Sequence[Any],
        block: int,
        wanted: Sequence[Sequence[int]],
        tokens: Sequence[list[int]] | None = None,
    ) -> list[torch.Tensor]:
        """Run a block, in chunks, over the wanted entries (by number) and all that it has not seen of their context."""
        missing = [self._rows[row].missing(block, some) for row, some in zip(rows, wanted)]
        states: list[list[torch.Tensor]] = [[] for _ in rows]
        for start in range(0, max(len(one) for one in missing), PREFILL_CHUNK):
            live = [i for i, one in enumerate(missing) if len(one) > start]
            parts = [missing[i][start : start + PREFILL_CHUNK] for i in live]
            given = None if tokens is None else [tokens[i][start : start + PREFILL_CHUNK] for i in live]
            found = self._pass([rows[i] for i in live], block, parts, given)
            for i, part, some in zip(live, parts, found):
                states[i].append(some)
                for entry in part:
                    self._rows[rows[i]].mark(block, entry)
        picked = []
        for unseen, asked, own in zip(missing, wanted, states):
            place = {entry: n for n, entry in enumerate(unseen)}
            joined_ND = own[0] if len(own) == 1 else torch.cat(own)
            picked.append(joined_ND[[place[entry] for entry in asked]])
        return picked

    def _pass(
        self, rows: Sequence[Any], block: int, chosen: Sequence[list[int]], tokens: Sequence[list[int]] | None
    ) -> Sequence[torch.Tensor]:
        """Run `block` over the entries `chosen`; their states [n, D] per row."""
        prepared = self._prepare(rows, chosen)
        inner = self.blocks[block]
        ran = time.perf_counter()
        if inner.inlet is not None:
            inner.inlet.states = self.cache.states_now(block - 1)[None]
        # The block's model embeds the tokens; in a later block the inlet ignores that.
        given = [Entries(part, []) for part in (tokens if tokens is not None else [[0] * len(one) for one in chosen])]
        with prepared.attending:
            output = inner.model(
                **self._inputs(given, prepared),
                attention_mask=prepared.mask,
                past_key_values=self.cache,
                use_cache=True,
            )
        states_ND = output.last_hidden_state[0]
        self._ran(ran, self.block_bytes[block])
        if self.eager or block + 1 < len(self.blocks):
            self.cache.put_states(block, states_ND)
        counts = [len(one) for one in chosen]
        return states_ND[: sum(counts)].split(counts)

    # what both have in common

    def _prepare(self, rows: Sequence[Any], chosen: Sequence[Sequence[int]]) -> _Prepared:
        """Make room for the entries `chosen` of each row, by number, and say what they see."""
        held = [self._rows[row] for row in rows]
        self.cache.ensure({one.own: one.length - one.elsewhere + len(one.positions) for one in held})
        places = [one.slots() for one in held]
        slots = [slot for place, some in zip(places, chosen) for slot in place.slots(some)]
        positions = [
            entry if entry < one.length else one.positions[entry - one.length]
            for one, some in zip(held, chosen)
            for entry in some
        ]
        tokens = padded(len(slots), self.buckets)
        spare = [0] * (tokens - len(slots))
        self.cache.begin(slots + spare, self.device)
        reads: dict[str, list[RowReads]] = {}
        made: dict[int | None, list[RowReads]] = {}
        for kind, window in self._plan.windows.items():
            if window not in made:
                made[window], first = [], 0
                for place, some in zip(places, chosen):
                    if some:
                        made[window].append(RowReads(first, first + len(some), pieces(place, some, window)))
                    first += len(some)
            reads[kind] = made[window]
        attending: Any = contextlib.nullcontext()
        masks: dict[str, torch.Tensor] = self._marks
        if self._plan.packed:
            attending = running(PackedPass(reads, self._marks), self._configs)
        else:
            masks = {
                kind: dense_mask(own, tokens, self.cache.size, self.device, self.dtype) for kind, own in reads.items()
            }
        mask = masks if self._plan.by_kind else next(iter(masks.values()))
        return _Prepared(tokens, positions + spare, attending, mask)

    def _inputs(self, entries: Sequence[Entries], prepared: _Prepared) -> dict[str, Any]:
        inputs: dict[str, Any] = {"position_ids": torch.tensor([prepared.positions], device=self.device)}
        spare = prepared.tokens - sum(len(entry.tokens) for entry in entries)
        if entries[0].states is None:
            tokens = [token for entry in entries for token in entry.tokens]
            inputs["input_ids"] = torch.tensor([tokens + [0] * spare], device=self.device)
        else:
            states = [entry.states for entry in entries if entry.states is not None]
            assert len(states) == len(entries), "either all rows bring states, or none"
            states_ND = torch.cat(states)
            inputs["inputs_embeds"] = nn.functional.pad(states_ND, (0, 0, 0, spare))[None]
        return inputs

    def _ran(self, since: float, moved: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.forward_seconds += time.perf_counter() - since
        self.bytes_moved += moved


@dataclass(slots=True)
class _Prepared:
    """A pass before it is run: its number of tokens with padding, their positions, and what they attend to."""

    tokens: int
    positions: list[int]
    attending: Any
    mask: Any


def _last(counts: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """The places in a pass of each row's last `wanted` entries."""
    places: list[int] = []
    end = 0
    for count, some in zip(counts, wanted):
        end += count
        places += range(end - some, end)
    return places
