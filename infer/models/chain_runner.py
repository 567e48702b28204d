"""Runs a causal LM whose recurrent states cannot branch: chains only, with the states kept from before each pass.

A state is the sum of all tokens so far, so a rejected token cannot be taken out of it. `forward` therefore leaves a
row's committed states alone and keeps the new ones beside them. If all entries are accepted, `commit` takes the new
states. If not, the old ones stay: `length` does not move past them, and the caller reads the accepted tokens again, in
front of its next draft. That costs no pass of its own.

Rows with unequal numbers of tokens: a recurrent layer cannot be padded behind a row's end, because padding would enter
the state too. A pass is cut into *segments* instead, each of equally many tokens of the rows that are not yet through:
rows of 3, 6 and 6 tokens run as 3 x 3, then 2 x 3. The states at a segment's end are kept as well, and a commit goes up
to the last of them that was accepted in full.

Legend: B rows of a segment, Q tokens of a segment (of a pass: padded), S slots, N entries of all rows, V vocabulary, D hidden.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from draftsmith.infer.models.cached_lm import PREFILL_CHUNK, Entries, weight_bytes
from draftsmith.infer.models.chain_cache import ChainCache, States


@dataclass(frozen=True, slots=True)
class ChainPlan:
    """How a family reads a chain: `windows` maps layer kind -> window (None: the whole context), `by_kind` says that it
    takes one mask per kind, and `single` that, with a state, it reads one token at a time and no more."""

    windows: Mapping[str, int | None] = field(default_factory=lambda: {"full_attention": None})
    by_kind: bool = False
    single: bool = False


@dataclass(slots=True)
class PassOutput:
    """The logits of all entries, row after row, and the layers asked for by name ([N, D] each)."""

    logits_NV: torch.Tensor
    taps: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class _Chain:
    """One row: its committed length and states, and the states at the ends of uncommitted segments, by tokens read."""

    index: int
    length: int = 0
    uncommitted: int = 0
    states: States = field(default_factory=dict)
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
        self.forward_seconds = 0.0
        self.bytes_moved = 0
        self.weight_bytes = weight_bytes(model)
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.cache_argument, self._takes_positions = _arguments(model)
        self._chains: dict[Any, _Chain] = {}
        self._order: list[Any] = []

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

    @torch.inference_mode()
    def forward(
        self, rows: Sequence[Any], entries: Sequence[Entries], taps: Sequence[str] = (), whole: bool = False
    ) -> PassOutput:
        """Run new `entries` of `rows`, each a chain below what the row has run since its last commit.

        `whole`: they will be committed as a whole, as a prompt is, so no states but the last are kept."""
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
        return PassOutput(
            torch.cat([part for parts in logits for part in parts]),
            {name: torch.cat([part[name] for parts in states for part in parts]) for name in taps},
        )

    @torch.inference_mode()
    def commit(self, rows: Sequence[Any], kept: Sequence[Sequence[int]]) -> None:
        """Keep the leading `kept` entries of each row, as far as there are states for them, and drop the rest."""
        for row, path in zip(rows, kept):
            chain = self._chains[row]
            assert list(path) == list(range(len(path))), "not the start of a chain"
            assert len(path) <= chain.uncommitted, "more than was run"
            read = 0
            for count, states in chain.ahead:
                if count <= len(path):
                    read, chain.states = count, states
            chain.length += read
        self.drop(rows)

    def drop(self, rows: Sequence[Any]) -> None:
        """Forget what `rows` have run since their last commit."""
        for row in rows:
            chain = self._chains[row]
            chain.uncommitted = 0
            chain.ahead.clear()

    def place(self, row: Any, length: int) -> None:
        """Pretend that `length` tokens are committed (timing only: the states are those that the row has)."""
        self._chains[row].length = length

    def _segment(self, chains: Sequence[_Chain], left: Sequence[int]) -> tuple[list[int], int]:
        """Which rows run next, in the order of their slots, and how many tokens of each.

        Rows without any state run by themselves: there is nothing to hand to the layers yet."""
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
        ran = time.perf_counter()
        output = self.model(
            input_ids=torch.tensor(tokens, device=self.device),
            use_cache=True,
            output_hidden_states=bool(taps),
            **arguments,
        )
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.forward_seconds += time.perf_counter() - ran
        self.bytes_moved += self.weight_bytes
        for chain, states in zip(chains, self.cache.states()):
            chain.uncommitted += width
            chain.ahead.append((chain.uncommitted, states))
        return output.logits, {name: output.hidden_states[_layer(name)] for name in taps}

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


class ChainPasses:
    """The methods of CachedLM over a ChainRunner: padded logits, prompts in chunks, one row per commit."""

    def __init__(self, runner: ChainRunner) -> None:
        self.runner = runner
        self.model = runner.model
        self.buckets = runner.buckets
        self.device, self.dtype = runner.device, runner.dtype
        self.open, self.close, self.has = runner.open, runner.close, runner.has
        self.length, self.uncommitted = runner.length, runner.uncommitted
        layers = int(runner.model.config.get_text_config().num_hidden_layers)
        self._layers = (*(f"layer:{layer}" for layer in range(layers)), "last")

    @property
    def forward_seconds(self) -> float:
        return self.runner.forward_seconds

    @property
    def bytes_moved(self) -> int:
        return self.runner.bytes_moved

    def forward(
        self, rows: Sequence[Any], entries: Sequence[Entries], hidden: bool = False, whole: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Run new `entries` of `rows`: logits [B, Q, V], right-padded with zeros, and hidden states if asked."""
        output = self.runner.forward(rows, entries, self._layers if hidden else (), whole)
        counts = [len(entry.tokens) for entry in entries]
        found = (output.logits_NV, *(output.taps[name] for name in self._layers if hidden))
        logits_BQV, *layers = (pad_sequence(list(one.split(counts)), batch_first=True) for one in found)
        return logits_BQV, tuple(layers)

    def prefill(
        self, rows: Sequence[Any], tokens: Sequence[list[int]], hidden: bool = False
    ) -> list[list[tuple[torch.Tensor, ...]]]:
        """Run `tokens` of each row into the cache in chunks; hidden states per row and chunk if asked.

        A family that reads one token at a time behind a state gets a prompt in one piece, as `generate` gives it."""
        longest = max((len(tokens_T) for tokens_T in tokens), default=0)
        chunk = max(longest, 1) if self.runner.plan.single else PREFILL_CHUNK
        states: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in rows]
        for offset in range(0, longest, chunk):
            live = [i for i, tokens_T in enumerate(tokens) if len(tokens_T) > offset]
            parts = [tokens[i][offset : offset + chunk] for i in live]
            chosen = [rows[i] for i in live]
            _, layers = self.forward(chosen, [Entries.chain(part) for part in parts], hidden, whole=True)
            for b, i in enumerate(live):
                states[i].append(tuple(layer[b, : len(parts[b])] for layer in layers))
            self.runner.commit(chosen, [range(len(part)) for part in parts])
        return states

    def commit(self, row: Any, kept: list[int]) -> None:
        self.runner.commit([row], [kept])


def _arguments(model: Any) -> tuple[str, bool]:
    """The name of the model's cache argument, and whether it takes positions. State-space models without attention
    take neither positions nor a mask."""
    known = inspect.signature(model.forward).parameters
    name = next((name for name in ("past_key_values", "cache_params") if name in known), None)
    if name is None:
        raise ValueError(f"{model.config.model_type} takes no cache that can be put back")
    return name, "position_ids" in known


def _layer(name: str) -> int:
    """The index of a named feature in transformers' hidden states; `last` is after the final norm."""
    return -1 if name == "last" else int(name.removeprefix("layer:"))
