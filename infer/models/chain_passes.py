"""The methods of CachedLM over a ChainRunner: padded logits, prompts in chunks, one row per commit.

Legend: B rows, Q queries (padded), V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from draftsmith.infer.models.cached_lm import PREFILL_CHUNK, Entries
from draftsmith.infer.models.chain_runner import ChainRunner


class ChainPasses:
    """What a target calls; `runner` does the work."""

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
