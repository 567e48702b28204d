"""Training-time test (EAGLE-3, arXiv 2503.01840): an EAGLE head's drafting over packed rows, all positions at once.

Unroll 0 runs every pair: the target's state at i, and token i + 1. Unroll t runs the head's own state of unroll t - 1
at the same i, and token i + 1 + t, at position i + t, as drafting does t tokens below pair i. There it sees the pairs
of unroll 0 up to i in its document, and what unrolls 1 to t made at i itself. Only positions that are learned go on
after unroll 0.

Legend: B rows, T positions, Q positions of a row that go on, N predictions, K unrolls, W width of the target's states,
D of the head's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from draftsmith.infer.heads.eagle import EagleHead
from draftsmith.infer.models.runner.attention import configs_of, running
from draftsmith.train.data.batches import IGNORED, Batch
from draftsmith.train.drafts.exits import document_mask
from draftsmith.train.drafts.unrolled_attention import LayerMemory, UnrollReads


@dataclass(frozen=True, slots=True)
class Predictions:
    """What the unrolls predict. `places_N`: the positions, of the flattened batch, whose next token it is, the same for
    every unroll; `states_KND`: after the final norm; `learned_KN`: where the unroll has a prediction at all, which it
    does not have at the first positions of a document."""

    places_N: torch.Tensor
    states_KND: list[torch.Tensor]
    learned_KN: torch.Tensor


class UnrolledHead(nn.Module):
    """`model`, run `unrolls` times. `checkpointing`: recompute an unroll in the backward pass instead of keeping it."""

    def __init__(self, model: EagleHead, unrolls: int, checkpointing: bool = False) -> None:
        super().__init__()
        assert unrolls >= 1
        self.model = model
        self.unrolls = unrolls
        self.checkpointing = checkpointing
        self._configs = configs_of(model)

    def forward(self, batch: Batch, features: Mapping[str, torch.Tensor]) -> Predictions:
        """`features`: the target's states [B, T, W] by name."""
        positions_BT, dtype = batch["position_ids"], self.model.fc.weight.dtype
        norm = self.model.model.norm
        learned_KBT = learned_pairs(batch["labels"], self.unrolls)
        going = GoingOn(learned_KBT[min(1, self.unrolls - 1)])
        seen = document_mask(positions_BT, self._attention_dtype(dtype))
        fed = self.model.joined({name: features[name].to(dtype) for name in self.model.features}).to(dtype)
        memory: list[LayerMemory] = []
        states = []
        for t in range(self.unrolls):
            tokens, positions = ahead(batch["input_ids"], 1 + t, 0), positions_BT
            if t:
                tokens, positions = going.take(tokens), going.take(positions) + t
            if t == 1:
                fed, seen = going.take(fed), pad(going.take(seen[:, 0]), (0, 1))[:, None]
            fed, memory = self._unroll(self.model.pairs(tokens, fed), positions, seen, memory)
            states.append(fed)
            if self.model.recurrent == "last":
                fed = norm(fed)
        places_N = ahead(learned_KBT[0], -1, False).flatten().nonzero()[:, 0]
        # Below zero it is the end of the last row, and before a row's start that of another; neither learns there.
        pairs_KN = torch.stack([places_N - 1 - t for t in range(self.unrolls)])
        slots_KN = torch.cat([pairs_KN[:1], going.slots()[pairs_KN[1:]]])
        return Predictions(
            places_N,
            [norm(own.flatten(0, 1)[slots_N]) for own, slots_N in zip(states, slots_KN)],
            learned_KBT.flatten(1).gather(1, pairs_KN % positions_BT.numel()),
        )

    def _attention_dtype(self, dtype: torch.dtype) -> torch.dtype:
        device = self.model.fc.weight.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype

    def _unroll(
        self, pairs: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor, memory: list[LayerMemory]
    ) -> tuple[torch.Tensor, list[LayerMemory]]:
        """The states before the final norm, and what the layers hold now."""

        def run(pairs: torch.Tensor) -> tuple[torch.Tensor, list[LayerMemory]]:
            reads = UnrollReads(seen, memory)
            stack = self.model.model
            states = pairs if self.model.design.version == 3 else self.model.fc(pairs)
            rotation = stack.rotary_emb(states, positions)
            with running(reads, self._configs):
                for layer in stack.layers:
                    states = layer(states, position_embeddings=rotation, attention_mask=None, position_ids=positions)
            return states, reads.made

        if self.checkpointing and self.training:
            again: tuple[torch.Tensor, list[LayerMemory]] = checkpoint(run, pairs, use_reentrant=False)
            return again
        return run(pairs)


def learned_pairs(labels_BT: torch.Tensor, unrolls: int) -> torch.Tensor:
    """[K, B, T] whether what pair i predicts at unroll t, token i + 2 + t, is learned: all tokens from i + 1 on are, so
    they lie in one answer of one document. An answer's first token is never drafted, and not learned here."""
    reached_BT = labels_BT != IGNORED
    learned = []
    for t in range(unrolls):
        reached_BT = reached_BT & ahead(labels_BT != IGNORED, 1 + t, False)
        learned.append(reached_BT)
    return torch.stack(learned)


def ahead(values_BT: torch.Tensor, by: int, fill: float) -> torch.Tensor:
    """At each position what is `by` positions further on in its row (further back if negative), or `fill`."""
    return pad(values_BT, (-by, by), value=fill)


class GoingOn:
    """The positions that go through the unrolls after the first. Rows with fewer than others are filled up with
    positions whose results nobody uses."""

    def __init__(self, chosen_BT: torch.Tensor) -> None:
        rows, width = chosen_BT.shape
        self.count = max(int(chosen_BT.sum(1).max()), 1)
        order_BT = chosen_BT.logical_not().to(torch.uint8).argsort(stable=True, dim=1)
        self.indices_BQ = order_BT[:, : self.count]
        self._rows_B1 = torch.arange(rows, device=chosen_BT.device)[:, None]
        self._width = width

    def take(self, values_BT: torch.Tensor) -> torch.Tensor:
        """[B, Q, ...]"""
        return values_BT[self._rows_B1, self.indices_BQ]

    def slots(self) -> torch.Tensor:
        """[B * T] where each position is in a flattened [B, Q]; 0 for those that do not go on."""
        rows, count = self.indices_BQ.shape
        slots_BT = self.indices_BQ.new_zeros((rows, self._width))
        own_BQ = torch.arange(rows * count, device=slots_BT.device).view(rows, count)
        return slots_BT.scatter_(1, self.indices_BQ, own_BQ).flatten()
