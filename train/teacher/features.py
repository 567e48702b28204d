"""The target's states at all positions of packed rows, for heads to read: live from the frozen target.

One pass without gradients gives the named states (names as in models/runner/taps.py); nothing else of it is kept.
CachedFeatures in feature_cache.py reads them from disk.

Legend: B rows, T positions, N chosen positions, W width of a state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from draftsmith.infer.models.runner.taps import Taps
from draftsmith.train.data.batches import Batch
from draftsmith.train.drafts.exits import packed_inputs, packs_by_positions
from draftsmith.train.teacher.live import LiveBatch, OutputHead


class FeatureBatch:
    """The states of a batch's positions by name, and the target's distributions wherever they are asked for."""

    def __init__(self, states: Mapping[str, torch.Tensor], output: OutputHead) -> None:
        self.states = states
        self.output = output

    def __getitem__(self, name: str) -> torch.Tensor:
        """[B, T, W]; they need no gradient."""
        return self.states[name]

    def distributions(self, at_N: torch.Tensor) -> LiveBatch:
        """The target's distributions after the tokens at `at_N`, indices into the batch's B x T positions."""
        return LiveBatch(self.states["last"].flatten(0, 1)[at_N], self.output)


class Features(Protocol):
    vocab_size: int

    def __call__(self, batch: Batch) -> FeatureBatch: ...


class LiveFeatures:
    """Reads `names`, and always `last`, from the frozen `model`, which is moved to the device of the batches."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        self.model = model.requires_grad_(False).eval()
        self.names = tuple(dict.fromkeys([*names, "last"]))
        self.output = OutputHead.of(model)
        self.vocab_size = self.output.head.out_features
        self._masked = not packs_by_positions(model)
        self._taps = Taps(model)
        for name in self.names:
            self._taps.check(name)

    # Not in inference mode, whose tensors no trained layer could take.
    @torch.no_grad()
    def __call__(self, batch: Batch) -> FeatureBatch:
        weight = self.output.head.weight
        if weight.device != batch["labels"].device:
            self.model.to(batch["labels"].device)
        self.model.eval()
        with self._taps.taking(self.names) as taken:
            self.model.base_model(**packed_inputs(batch, weight.dtype, self._masked))
            return FeatureBatch({name: taken[name] for name in self.names}, self.output)
