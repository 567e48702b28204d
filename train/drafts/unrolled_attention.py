"""Attention of a head that is unrolled over packed rows (unrolled.py): its first pass, and those that are fed back.

A position of a later pass sees the keys of the first one, as its mask says, and the own keys that the later passes made
at the position itself. Those become one more key of the first pass, whose score is the log-sum-exp of theirs and whose
value is their weighted mean. So one call of torch's fused attention weighs both, with gradients, and no scores of
[positions, positions x passes] exist.

Legend: B rows, T positions of the first pass, Q of a later one, H query heads, G key/value heads, R = H / G, P later
passes, S head size, A head size with room for the score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from draftsmith.infer.models.runner.attention import Shaping

# Fused attention on a GPU wants head sizes that are multiples of this.
ALIGNED = 8


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """The keys and values of a layer: of the first pass [B, G, T + 1, A], the last one for the own ones; and the own
    ones [B, G, Q, S] of each later pass."""

    keys: torch.Tensor
    values: torch.Tensor
    own: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()

    @classmethod
    def of(cls, keys_BGTS: torch.Tensor, values_BGTS: torch.Tensor) -> LayerMemory:
        size = keys_BGTS.shape[-1]
        room = (0, -(-(size + 2) // ALIGNED) * ALIGNED - size, 0, 1)
        keys, values = pad(keys_BGTS.to(values_BGTS.dtype), room), pad(values_BGTS, room)
        # Two coordinates, because a score in one of low precision would be off by some percent.
        keys[:, :, -1, size : size + 2] = 1.0
        values[:, :, -1, size] = 1.0
        return cls(keys, values)

    def attend(self, query_BHQS: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[B, H, Q, S] for queries that are scaled; the last column of `mask` belongs to the own keys."""
        heads, size = query_BHQS.shape[1], query_BHQS.shape[3]
        dtype = self.values.dtype
        keys_BGQPS = torch.stack([key for key, _ in self.own], 3).to(dtype)
        values_BGQPS = torch.stack([value for _, value in self.own], 3)
        folded_BGRQS = query_BHQS.to(dtype).unflatten(1, (keys_BGQPS.shape[1], -1))
        scores_BHQP = torch.einsum("bgrqs,bgqps->bgrqp", folded_BGRQS, keys_BGQPS).flatten(1, 2)
        exact_BHQP = scores_BHQP.to(torch.promote_types(dtype, torch.float32))
        weights_BGRQP = exact_BHQP.softmax(-1).to(dtype).unflatten(1, (keys_BGQPS.shape[1], -1))
        own_BHQS = torch.einsum("bgrqp,bgqps->bgrqs", weights_BGRQP, values_BGQPS).flatten(1, 2)
        score_BHQ1 = exact_BHQP.logsumexp(-1, keepdim=True)
        high = score_BHQ1.to(dtype)
        low = (score_BHQ1 - high).to(dtype)
        asked = torch.cat([query_BHQS.to(dtype), high, low], -1)
        asked = pad(asked, (0, self.keys.shape[-1] - size - 2))
        grouped = self.keys.shape[1] != heads
        out = scaled_dot_product_attention(asked, self.keys, self.values, mask, scale=1.0, enable_gqa=grouped)
        seen: torch.Tensor = out[..., :size] + out[..., size : size + 1] * own_BHQS
        return seen


class UnrollReads:
    """What the positions of one pass read; `made` collects each layer's keys and values. `memory` is that of the layers
    before this pass, empty in the first one."""

    def __init__(self, mask: torch.Tensor, memory: Sequence[LayerMemory]) -> None:
        self.mask = mask
        self.memory = memory
        self.made: list[LayerMemory] = []

    def attend(
        self,
        query_BHQS: torch.Tensor,
        key_BGQS: torch.Tensor,
        value_BGQS: torch.Tensor,
        mark: torch.Tensor | None,
        shaping: Shaping,
    ) -> torch.Tensor:
        """[B, Q, H, S]"""
        if not self.memory:
            dtype = value_BGQS.dtype
            grouped = key_BGQS.shape[1] != query_BHQS.shape[1]
            out = scaled_dot_product_attention(
                query_BHQS.to(dtype), key_BGQS.to(dtype), value_BGQS, self.mask, scale=shaping.scale, enable_gqa=grouped
            )
            self.made.append(LayerMemory.of(key_BGQS, value_BGQS))
        else:
            before = self.memory[len(self.made)]
            now = LayerMemory(before.keys, before.values, (*before.own, (key_BGQS, value_BGQS)))
            out = now.attend(query_BHQS * shaping.scale, self.mask)
            self.made.append(now)
        return out.transpose(1, 2)
