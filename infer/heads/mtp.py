"""MTP heads, which a target's own checkpoint brings (DeepSeek-V3, arXiv 2412.19437): one decoder layer of the target's
kind over pairs of its last state and the token that follows it.

As EAGLE-1: pair i is the state at position i, after the final norm, with token i + 1, and predicts token i + 2. Both
are normed and joined; the target's head reads the layer's normed output, which is also fed back below a drafted pair.
The head was trained for one step, and is run again and again.

Legend: N pairs, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from draftsmith.infer.heads.pair_module import PairModule
from draftsmith.infer.heads.rotary import KeptRotary
from draftsmith.infer.models.layers import state_of


class MTPStack(nn.Module):
    """One layer and the norm behind it. `rotary`: the family's rotary embedding."""

    def __init__(self, layer: nn.Module, norm: nn.Module, rotary: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer])
        self.norm = norm
        self.rotary_emb = KeptRotary(rotary)

    def forward(
        self, states: torch.Tensor, position_ids: torch.Tensor, past_key_values: Any, attention_mask: Any
    ) -> tuple[torch.Tensor]:
        out = self.layers[0](
            states,
            position_embeddings=self.rotary_emb(states, position_ids),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        return (self.norm(state_of(out)),)


class MTPHead(PairModule):
    """A head, as a ModelRunner runs it, with EagleHead's interface. The target lends its embedding and its head.

    `config`: of a model with this one layer. `blank_first`: the embedding of the first pair is zeros."""

    features = ("last",)
    recurrent = "last"
    ids_V: torch.Tensor | None = None

    def __init__(
        self,
        config: Any,
        stack: MTPStack,
        embedding_norm: nn.Module,
        state_norm: nn.Module,
        blank_first: bool,
    ) -> None:
        super().__init__()
        self.config = config
        self.feature_width = int(config.hidden_size)
        self.model = stack
        self.embedding_norm = embedding_norm
        self.state_norm = state_norm
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.blank_first = blank_first

    def joined(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[N, H] what pairs hold of the target's states by name."""
        return features["last"]

    def entering(self, pairs: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        embedded, states = pairs.chunk(2, -1)
        if self.blank_first:
            embedded = embedded.masked_fill((position_ids == 0)[..., None], 0)
        entered: torch.Tensor = self.fc(torch.cat([self.embedding_norm(embedded), self.state_norm(states)], -1))
        return entered
