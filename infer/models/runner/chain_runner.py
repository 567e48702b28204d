"""Runs a causal LM whose recurrent states cannot branch: chains only, with the states kept from before each pass.

A state is the sum of all tokens so far, so a rejected token cannot be taken out of it. `forward` therefore leaves a
row's committed states alone and keeps the new ones beside them. If all entries are accepted, `commit` takes the new
states. If not, the old ones stay: `length` does not move past them, and the caller reads the accepted tokens again, in
front of its next draft. That costs no pass of its own.

Rows with unequal numbers of tokens: a recurrent layer cannot be padded behind a row's end, because padding would enter
the state too. A pass is cut into *segments* instead, each of equally many tokens of the rows that are not yet through:
rows of 3, 6 and 6 tokens run as 3 x 3, then 2 x 3. The states at a segment's end are kept as well, and a commit goes up
to the last of them that was accepted in full.

Legend: B rows and Q tokens of a segment, or of a padded pass, S slots, N entries of all rows, V vocabulary, D hidden
or head size, H heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from draftsmith.infer.models.layers import weight_bytes
from draftsmith.infer.models.runner.clock import PassClock
from draftsmith.infer.models.runner.entries import Entries, PassOutput
from draftsmith.infer.models.runner.masks import ChainPlan
from draftsmith.infer.models.runner.model_runner import PREFILL_CHUNK
from draftsmith.infer.models.runner.taps import Taps
from draftsmith.infer.models.runner.transfers import Transfers

# Slots by which the cache grows, at least.
GROWTH = 256

# A row's states by (kind, layer, number): convolution inputs or a recurrent state, each [1, ...].
States = dict[tuple[str, int, int], torch.Tensor]


class ChainCache:
    """What transformers' layers call (transformers/cache_utils.py): the token at position t in slot t, and the states
    of one segment.

    Each segment works on copies of its rows' states and hands the new ones back, so the old ones remain to go on from.
    `begin` sets its rows, slots and states; buffers take the shape of the first keys and values."""

    is_compileable = False

    def __init__(self) -> None:
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.rows = 0
        self.slots = 0
        self._rows_B: slice | torch.Tensor = slice(0)
        self._index_B1 = torch.zeros(0)
        self._slots_BQ = torch.zeros(0)
        self._end = 0
        self._width = 0
        self._working: States = {}

    def begin(self, rows: Sequence[int], slots_BQ: torch.Tensor, states: Sequence[States]) -> None:
        """The next segment runs these rows, writes these slots and continues from these states."""
        first, count = rows[0], len(rows)
        contiguous = list(rows) == list(range(first, first + count))
        index_B = torch.tensor(rows, device=slots_BQ.device)
        self._rows_B = slice(first, first + count) if contiguous else index_B
        self._index_B1 = index_B[:, None]
        self._slots_BQ = slots_BQ
        self._end, self._width = int(slots_BQ.max()) + 1, slots_BQ.shape[1]
        # Copies even of one row: some layers write into the state that they are given.
        self._working = {key: torch.cat([state[key] for state in states]) for key in states[0]}

    def states(self) -> list[States]:
        """Each row's states after the segment."""
        count = len(self._index_B1)
        return [{key: state_B[b : b + 1] for key, state_B in self._working.items()} for b in range(count)]

    @torch.inference_mode()
    def reserve(self, rows: int, slots: int) -> None:
        """Grow to at least this many rows and slots, keeping what is stored."""
        if rows <= self.rows and slots <= self.slots:
            return
        self.rows = max(rows, self.rows)
        if slots > self.slots:
            self.slots = max(slots, self.slots + GROWTH)
        for buffers in (self.keys, self.values):
            for layer, old_BSHD in buffers.items():
                new_BSHD = old_BSHD.new_zeros((self.rows, self.slots, *old_BSHD.shape[2:]))
                new_BSHD[: old_BSHD.shape[0], : old_BSHD.shape[1]] = old_BSHD
                buffers[layer] = new_BSHD

    @torch.inference_mode()
    def move_row(self, source: int, target: int, used: int) -> None:
        """Copy the first `used` slots of row `source` to row `target`."""
        for buffers in (self.keys, self.values):
            for buffer_BSHD in buffers.values():
                buffer_BSHD[target, :used] = buffer_BSHD[source, :used]

    # attention layers

    def update(
        self, key_BHQD: torch.Tensor, value_BHQD: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one layer's new entries; return its keys and values up to the last slot in use."""
        shown = []
        for buffers, new_BHQD in ((self.keys, key_BHQD), (self.values, value_BHQD)):
            if layer_idx not in buffers:
                buffers[layer_idx] = new_BHQD.new_zeros((self.rows, self.slots, *new_BHQD.shape[1::2]))
            buffer_BSHD = buffers[layer_idx]
            buffer_BSHD[self._index_B1, self._slots_BQ] = new_BHQD.transpose(1, 2)
            shown.append(buffer_BSHD[self._rows_B, : self._end].transpose(1, 2))
        return shown[0], shown[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The tokens before this segment, in the longest row."""
        return self._end - self._width

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._end, 0

    # recurrent layers

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return bool(self._working)

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._working.get(("conv", layer_idx, state_idx))

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Append inputs to a convolution's; keeps the last of them, returns all."""
        key = ("conv", layer_idx, state_idx)
        before = self._working.get(key)
        if before is None:
            size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            known = torch.nn.functional.pad(conv_states, (max(size - conv_states.shape[-1], 0), 0))
        else:
            size = before.shape[-1]
            known = torch.cat([before, conv_states], dim=-1)
        self._working[key] = known[..., known.shape[-1] - size :]
        return known

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._working.get(("recurrent", layer_idx, state_idx))

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        self._working["recurrent", layer_idx, state_idx] = recurrent_states
        return recurrent_states


@dataclass(slots=True)
class _Chain:
    """One row: its committed length and states, those before its last commit, and the states at the ends of uncommitted
    segments, by tokens read."""

    index: int
    length: int = 0
    uncommitted: int = 0
    states: States = field(default_factory=dict)
    before: tuple[int, States] | None = None
    ahead: list[tuple[int, States]] = field(default_factory=list)

    @property
    def newest(self) -> States:
        return self.ahead[-1][1] if self.ahead else self.states


class ChainRunner:
    """A causal LM with recurrent layers. Rows are identified by objects of the caller's."""

    buckets: tuple[int, ...] = ()

    def __init__(self, model: Any, plan: ChainPlan) -> None:
        self.model = model
        self.plan = plan
        self.cache = ChainCache()
        self.taps = Taps(model)
        self.transfers = Transfers()
        self.bytes_moved = 0
        self.weight_bytes = weight_bytes(model)
        weight = next(model.parameters())
        self.device, self.dtype, self._clock = weight.device, weight.dtype, PassClock(weight.device)
        self.cache_argument, self._takes_positions = _arguments(model)
        self._chains: dict[Any, _Chain] = {}
        self._order: list[Any] = []

    @property
    def forward_seconds(self) -> float:
        return self._clock.seconds

    # rows

    def open(self, row: Any, room: int) -> None:
        """Add a row that will need `room` slots in all."""
        assert row not in self._chains, "row is open already"
        self._chains[row] = _Chain(len(self._order))
        self._order.append(row)
        self.cache.reserve(len(self._order), room)

    def close(self, row: Any) -> None:
        """Remove a row; the last row takes its place, so that live rows stay contiguous."""
        chain = self._chains.pop(row)
        last = self._order.pop()
        if last is not row:
            moved = self._chains[last]
            self.cache.move_row(moved.index, chain.index, moved.length + moved.uncommitted)
            moved.index = chain.index
            self._order[chain.index] = last

    def has(self, row: Any) -> bool:
        return row in self._chains

    def length(self, row: Any) -> int:
        """The number of the row's tokens that its committed states have read."""
        return self._chains[row].length

    def uncommitted(self, row: Any) -> int:
        return self._chains[row].uncommitted

    # passes

    def forward(
        self,
        rows: Sequence[Any],
        entries: Sequence[Entries],
        taps: Sequence[str] = (),
        wanted: Sequence[int] | None = None,
    ) -> PassOutput:
        """Run new `entries` of `rows`, each a chain below what the row has run since its last commit. `wanted[b]`: of
        how many of row b's last entries to return the logits; None: of all."""
        return self._pass(rows, entries, taps, wanted, whole=False)

    def prefill(
        self, rows: Sequence[Any], tokens: Sequence[list[int]], taps: Sequence[str] = (), on_logits: Any = None
    ) -> list[dict[str, torch.Tensor]]:
        """Run `tokens` of each row in chunks and commit them; the tapped states [n, D] of each row by name. A family
        that reads token by token behind a state gets a prompt whole, as in `generate`. `on_logits`: see ModelRunner."""
        longest = max(map(len, tokens), default=0)
        chunk = max(longest, 1) if self.plan.single else PREFILL_CHUNK
        states: list[dict[str, list[torch.Tensor]]] = [{name: [] for name in taps} for _ in rows]
        for offset in range(0, longest, chunk):
            live = [i for i, own in enumerate(tokens) if len(own) > offset]
            parts = [tokens[i][offset : offset + chunk] for i in live]
            chosen, counts = [rows[i] for i in live], [len(part) for part in parts]
            wanted = [0] * len(parts) if on_logits is None else counts
            output = self._pass(chosen, [*map(Entries.chain, parts)], taps, wanted, whole=True)
            if on_logits is not None:
                on_logits(chosen, counts, output.logits_NV)
            for name in taps:
                for i, own in zip(live, output.taps[name].split(counts)):
                    states[i][name].append(own)
            self.commit(chosen, [range(len(part)) for part in parts])
        return [{name: torch.cat(own) for name, own in found.items() if own} for found in states]

    @torch.inference_mode()
    def _pass(
        self,
        rows: Sequence[Any],
        entries: Sequence[Entries],
        taps: Sequence[str],
        wanted: Sequence[int] | None,
        whole: bool,
    ) -> PassOutput:
        """`whole`: the entries will be committed as a whole, as a prompt is, so no states but the last are kept."""
        chains = [self._chains[row] for row in rows]
        for chain, entry in zip(chains, entries):
            first = chain.uncommitted - 1
            assert entry.parents == list(range(first, first + len(entry.tokens))), "a recurrent state cannot branch"
        needed = [chain.length + chain.uncommitted + len(entry.tokens) for chain, entry in zip(chains, entries)]
        self.cache.reserve(len(self._order), max(needed))
        logits: list[list[torch.Tensor]] = [[] for _ in rows]
        states: list[list[dict[str, torch.Tensor]]] = [[] for _ in rows]
        done = [0] * len(rows)
        while True:
            some, width = self._segment(chains, [len(entry.tokens) - at for entry, at in zip(entries, done)])
            if not some:
                break
            tokens = [entries[b].tokens[done[b] : done[b] + width] for b in some]
            if whole:
                for b in some:
                    del chains[b].ahead[:-1]
            logits_BQV, layers = self._run([chains[b] for b in some], tokens, taps)
            for at, b in enumerate(some):
                logits[b].append(logits_BQV[at])
                states[b].append({name: layer_BQD[at] for name, layer_BQD in layers.items()})
                done[b] += width
        shown = [torch.cat(parts) for parts in logits]
        if wanted is not None:
            shown = [logits_NV[len(logits_NV) - count :] for logits_NV, count in zip(shown, wanted)]
        return PassOutput(
            torch.cat(shown), {name: torch.cat([part[name] for parts in states for part in parts]) for name in taps}
        )

    @torch.inference_mode()
    def commit(self, rows: Sequence[Any], kept: Sequence[Sequence[int]], picks: Sequence[int] = ()) -> torch.Tensor:
        """Keep the leading `kept` entries of each row, as far as there are states for them; `picks` on the device."""
        for row, path in zip(rows, kept):
            chain = self._chains[row]
            assert list(path) == list(range(len(path))), "not the start of a chain"
            assert len(path) <= chain.uncommitted, "more than was run"
            found = [(count, states) for count, states in chain.ahead if count <= len(path)]
            chain.before = chain.length, chain.states
            if found:
                chain.length, chain.states = chain.length + found[-1][0], found[-1][1]
        self.drop(rows)
        return self.transfers.up(self.device, picks)[0] if picks else torch.empty(0, dtype=torch.long)

    def drop(self, rows: Sequence[Any]) -> None:
        """Forget what `rows` have run since their last commit."""
        for row in rows:
            chain = self._chains[row]
            chain.uncommitted = 0
            chain.ahead.clear()

    def shorten(self, row: Any, length: int) -> None:
        """Drop the uncommitted entries of a row; if it has more than `length` tokens, take its last commit back."""
        chain = self._chains[row]
        self.drop([row])
        if chain.length > length:
            assert chain.before is not None
            chain.length, chain.states = chain.before

    def place(self, rows: Sequence[Any], context: int) -> None:
        """Pretend that `context` tokens are committed (timing only: the states are those that a row has)."""
        for row in rows:
            self._chains[row].length = context

    def _segment(self, chains: Sequence[_Chain], left: Sequence[int]) -> tuple[list[int], int]:
        """Which rows run next, in the order of their slots, and how many tokens of each. Rows without any state run by
        themselves: there is nothing to hand to the layers yet."""
        live = sorted((b for b, count in enumerate(left) if count), key=lambda b: chains[b].index)
        fresh = [b for b in live if not chains[b].newest and not chains[b].length]
        some = fresh or live
        if not some:
            return [], 0
        width = min(left[b] for b in some)
        if not self.plan.single:
            return some, width
        # What is left after the first segment would go token by token.
        return ([b for b in some if left[b] == width], width) if fresh else (some, 1)

    def _run(
        self, chains: Sequence[_Chain], tokens: Sequence[list[int]], taps: Sequence[str]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One call of the model with equally many tokens of each row."""
        width = len(tokens[0])
        starts_B1 = torch.tensor([[chain.length + chain.uncommitted] for chain in chains], device=self.device)
        positions_BQ = starts_B1 + torch.arange(width, device=self.device)
        self.cache.begin([chain.index for chain in chains], positions_BQ, [chain.newest for chain in chains])
        arguments: dict[str, Any] = {self.cache_argument: self.cache}
        if self._takes_positions:
            arguments["position_ids"] = positions_BQ
            arguments["attention_mask"] = self._mask(positions_BQ)
        begun = self._clock.begin()
        with self.taps.taking(taps) as taken:
            output = self.model(input_ids=torch.tensor(tokens, device=self.device), use_cache=True, **arguments)
        self._clock.end(begun)
        self.bytes_moved += self.weight_bytes
        for chain, states in zip(chains, self.cache.states()):
            chain.uncommitted += width
            chain.ahead.append((chain.uncommitted, states))
        return output.logits, taken

    def _mask(self, positions_BQ: torch.Tensor) -> Any:
        """Additive masks over the slots: in a chain a token's slot is its position."""
        slots_S = torch.arange(int(positions_BQ.max()) + 1, device=self.device)
        distance_BQS = positions_BQ[:, :, None] - slots_S
        masks: dict[str, torch.Tensor | None] = {}
        for kind, window in self.plan.windows.items():
            hidden_BQS = (distance_BQS < 0) if window is None else (distance_BQS < 0) | (distance_BQS >= window)
            mask = torch.zeros(hidden_BQS.shape, dtype=self.dtype, device=self.device)
            masks[kind] = mask.masked_fill_(hidden_BQS, torch.finfo(self.dtype).min)[:, None]
        if not self.plan.by_kind:
            return next(iter(masks.values()))
        return dict.fromkeys(self.model.config.get_text_config().layer_types) | masks


def _arguments(model: Any) -> tuple[str, bool]:
    """The name of the model's cache argument, and whether it takes positions. State-space models without attention
    take neither positions nor a mask."""
    known = inspect.signature(model.forward).parameters
    name = next((name for name in ("past_key_values", "cache_params") if name in known), None)
    if name is None:
        raise ValueError(f"{model.config.model_type} takes no cache that can be put back")
    return name, "position_ids" in known
