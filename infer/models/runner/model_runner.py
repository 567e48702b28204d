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

from collections.abc import Callable, Sequence
from typing import Any

import torch

from draftsmith.infer.costs.pass_costs import padded
from draftsmith.infer.models.layers import check_parts, find_parts, inner_block, parameter_bytes, weight_bytes
from draftsmith.infer.models.runner.arena import Arena, Region
from draftsmith.infer.models.runner.attention import configs_of
from draftsmith.infer.models.runner.captured import CapturedPasses
from draftsmith.infer.models.runner.clock import PassClock
from draftsmith.infer.models.runner.entries import Entries, PassOutput, RunnerRow
from draftsmith.infer.models.runner.masks import MaskPlan
from draftsmith.infer.models.runner.pass_inputs import ChosenEntries, PassInputs, PassPlan, pass_inputs
from draftsmith.infer.models.runner.plain_stack import plain_stack, unhooked
from draftsmith.infer.models.runner.taps import Taps
from draftsmith.infer.models.runner.transfers import Transfers

PREFILL_CHUNK = 512
# The chunk where a prompt's logits are wanted: they take vocabulary x 4 bytes per token.
LOGITS_CHUNK = 128
# Takes the rows of a prompt's pass, how many tokens of each it ran, and their logits [N, V].
OnLogits = Callable[[Sequence[Any], Sequence[int], torch.Tensor], None]


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
        self.transfers = Transfers()
        self.captured: CapturedPasses | None = None
        self.bytes_moved = 0
        self.weight_bytes = weight_bytes(model)
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.buckets = tuple(buckets)
        self._clock = PassClock(self.device)
        self._rows: dict[Any, RunnerRow] = {}
        marks = {kind: torch.zeros((1, 1, 1, 1), device=self.device) for kind in mask_plan.windows}
        configs = configs_of(model)
        if exits:
            self.parts = find_parts(model)
            check_parts(model, self.parts)
            cuts = list(zip((0, *exits), exits))
            self.blocks = [inner_block(model, start, end) for start, end in cuts]
            self.block_bytes = [parameter_bytes(self.parts.layers[start:end]) for start, end in cuts]
            self.head_bytes = parameter_bytes([self.parts.head, self.parts.norm])
            known = {id(config) for config in configs}
            for block in self.blocks:
                configs += [one for one in configs_of(block.model) if id(one) not in known]
        self._plan = PassPlan(mask_plan, marks, configs, self.buckets, self.device, self.dtype)
        bases = [block.model for block in self.blocks] if exits else [None]
        self._stacks = [plain_stack(model, base) if mask_plan.packed else None for base in bases]

    @property
    def forward_seconds(self) -> float:
        """Seconds inside passes that have ended."""
        return self._clock.seconds

    def capture(self) -> bool:
        """Give passes of few tokens static shapes from now on, and capture them on a CUDA device (captured.py); before
        the first row. False if this model's passes cannot have them: blocks, and layers that attend on their own."""
        assert not self._rows, "passes are captured before the first row"
        if self.exits or not self._plan.masks.packed:
            return False
        self.cache = Arena(lasting=True)
        self.captured = CapturedPasses(self.model, self._plan, self.cache, self.taps, self.transfers)
        return True

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

    def commit(self, rows: Sequence[Any], kept: Sequence[Sequence[int]], picks: Sequence[int] = ()) -> torch.Tensor:
        """Keep of each row the uncommitted entries at `kept` (a path, in order) and drop the rest.

        `picks`: numbers that the caller needs on the device too; they go up together with the commit's own."""
        sources: list[int] = []
        targets: list[int] = []
        for row, path in zip(rows, kept):
            held = self._rows[row]
            end = held.own.start + held.length - held.elsewhere
            for at, entry in enumerate(path):
                if entry != at:
                    sources.append(end + entry)
                    targets.append(end + at)
        picks_N = torch.empty(0, dtype=torch.long)
        if sources or picks:
            picks_N = self._move(sources, targets, picks)
        for row, path in zip(rows, kept):
            self._rows[row].keep(path)
        return picks_N

    def _move(self, sources: list[int], targets: list[int], picks: Sequence[int]) -> torch.Tensor:
        spare = [0] * self.captured.spare_moves(len(sources)) if self.captured is not None else []
        from_N, to_N, picks_N = self.transfers.up(self.device, sources + spare, targets + spare, picks)
        if sources and not (spare and self.captured is not None and self.captured.move(from_N, to_N)):
            self.cache.move(from_N, to_N)
        return picks_N

    # passes through the whole model

    @torch.inference_mode()
    def forward(
        self,
        rows: Sequence[Any],
        entries: Sequence[Entries],
        taps: Sequence[str] = (),
        wanted: Sequence[int] | None = None,
        eagerly: bool = False,
    ) -> PassOutput:
        """Run new `entries` of `rows`. `wanted[b]`: of how many of row b's last entries to return the logits; None: of
        all. `eagerly`: never as a captured pass. After an error the rows hold entries that `drop` removes."""
        assert not self.exits, "a sorted draft is run block by block"
        chosen = [self._rows[row].append(entry.parents) for row, entry in zip(rows, entries)]
        counts = [len(entry.tokens) for entry in entries]
        total = sum(counts)
        keep = _last(counts, wanted) if wanted is not None else list(range(total))
        ready = self._choose(rows, chosen, entries)
        begun = self._clock.begin()
        output = None if self.captured is None or eagerly else self.captured.run(ready, taps, keep)
        if output is None:
            output = self._run_eagerly(ready, taps, keep)
        self._ran(begun, self.weight_bytes)
        for row in rows:
            self._rows[row].passed = [1] * len(self._rows[row].positions)
        return output

    def _run_eagerly(self, ready: ChosenEntries, taps: Sequence[str], keep: Sequence[int]) -> PassOutput:
        total = len(ready.slots)
        inputs = self._inputs(ready, keep if 0 < len(keep) < padded(total, self.buckets) else ())
        if stack := unhooked(self._stacks[0]):
            logits_NV, taken = stack.logits(inputs, self.cache, taps, bool(keep))
            return PassOutput(logits_NV[: len(keep)], {name: taken[name][:total] for name in taps})
        asked: Any = int(not keep) if inputs.keep_K is None else inputs.keep_K
        with self.taps.taking(taps) as taken, inputs.attending:
            output = self.model(**inputs.arguments, logits_to_keep=asked)
            states = {name: taken[name][0, :total] for name in taps}
        logits_NV = output.logits[0]
        if inputs.keep_K is not None and logits_NV.shape[0] != len(keep):  # a model that returns them all
            logits_NV = logits_NV[inputs.keep_K]
        return PassOutput(logits_NV[: len(keep)], states)

    def prefill(
        self,
        rows: Sequence[Any],
        tokens: Sequence[list[int]],
        taps: Sequence[str] = (),
        blocks: int = 1,
        on_logits: OnLogits | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """Run `tokens` of each row in chunks, through the first `blocks` blocks of a sorted draft, and commit them; the
        tapped states [n, D] of each row by name. `on_logits`: compute all logits, and call this after each pass."""
        size = PREFILL_CHUNK if on_logits is None else LOGITS_CHUNK
        states: list[dict[str, list[torch.Tensor]]] = [{name: [] for name in taps} for _ in rows]
        offset = 0
        while any(len(own) > offset for own in tokens):
            live = [i for i, own in enumerate(tokens) if len(own) > offset]
            parts = [tokens[i][offset : offset + size] for i in live]
            chosen = [rows[i] for i in live]
            entries = [Entries.chain(part) for part in parts]
            if self.exits:
                self.enter(chosen, entries)
                for block in range(1, 1 if self.eager else blocks):
                    self._run(chosen, block, [self._newest(row, len(part)) for row, part in zip(chosen, parts)])
            else:
                counts = [len(part) for part in parts]
                wanted = [0] * len(parts) if on_logits is None else counts
                output = self.forward(chosen, entries, taps, wanted, eagerly=True)
                if on_logits is not None:
                    on_logits(chosen, counts, output.logits_NV)
                for name in taps:
                    for i, own in zip(live, output.taps[name].split(counts)):
                        states[i][name].append(own)
            self.commit(chosen, [range(len(part)) for part in parts])
            offset += size
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
        begun = self._clock.begin()
        logits_NV = self.parts.logits(states_ND)
        self._ran(begun, self.head_bytes)
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
        inner = self.blocks[block]
        # The block's model embeds the tokens; in a later block the inlet ignores that.
        given = [Entries(part, []) for part in (tokens if tokens is not None else [[0] * len(one) for one in chosen])]
        inputs = self._inputs(self._choose(rows, chosen, given))
        begun = self._clock.begin()
        if inner.inlet is not None:
            inner.inlet.states = self.cache.states_now(block - 1)[None]
        if stack := unhooked(self._stacks[block]):
            states_ND, _ = stack.states(inputs, self.cache)
        else:
            with inputs.attending:
                states_ND = inner.model(**inputs.arguments).last_hidden_state[0]
        self._ran(begun, self.block_bytes[block])
        if self.eager or block + 1 < len(self.blocks):
            self.cache.put_states(block, states_ND)
        counts = [len(one) for one in chosen]
        return states_ND[: sum(counts)].split(counts)

    # what both have in common

    def _choose(
        self, rows: Sequence[Any], chosen: Sequence[Sequence[int]], entries: Sequence[Entries]
    ) -> ChosenEntries:
        """Make room for the entries `chosen` of each row, by number."""
        held = [self._rows[row] for row in rows]
        self.cache.ensure({one.own: one.length - one.elsewhere + len(one.positions) for one in held})
        states = [entry.states for entry in entries if entry.states is not None]
        assert len(states) in (0, len(entries)), "either all rows bring states, or none"
        tokens = [token for entry in entries for token in entry.tokens]
        return ChosenEntries(held, chosen, tokens, torch.cat(states) if states else None)

    def _inputs(self, ready: ChosenEntries, keep: Sequence[int] = ()) -> PassInputs:
        return pass_inputs(ready, self._plan, self.cache, self.transfers, keep)

    def _ran(self, begun: Any, moved: int) -> None:
        self._clock.end(begun)
        self.bytes_moved += moved


def _last(counts: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """The places in a pass of each row's last `wanted` entries."""
    places: list[int] = []
    end = 0
    for count, some in zip(counts, wanted):
        end += count
        places += range(end - some, end)
    return places
