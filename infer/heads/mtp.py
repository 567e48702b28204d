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
from transformers.modeling_outputs import CausalLMOutput

from draftsmith.infer.heads.rotary import KeptRotary
from draftsmith.infer.models.layers import shaped_logits, state_of


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


class MTPHead(nn.Module):
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
        self._lent: tuple[Any, ...] = (None, None)
        self._shaping = (1.0, 0.0)

    def lend(self, embedding: nn.Module, head: nn.Module | None, scale: float = 1.0, softcap: float = 0.0) -> None:
        """Take the target's embedding and head; they are not among this module's parameters."""
        self._lent = (embedding, head)
        self._shaping = (scale, softcap)

    def get_input_embeddings(self) -> Any:
        return self._lent[0]

    def get_output_embeddings(self) -> Any:
        return self._lent[1]

    def joined(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[N, H] what pairs hold of the target's states by name."""
        return features["last"]

    def pairs(self, tokens_N: torch.Tensor, states_NH: torch.Tensor) -> torch.Tensor:
        """[N, 2 H] what the head is run on: each token's embedding, then the state before it."""
        embedded_NH = self.get_input_embeddings()(tokens_N).to(states_NH.dtype)
        return torch.cat([embedded_NH, states_NH], -1)

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """[..., V] of states after the norm."""
        return shaped_logits(self.get_output_embeddings()(normed), *self._shaping)

    def forward(
        self,
        *,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: Any = None,
        attention_mask: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
    ) -> CausalLMOutput:
        """`inputs_embeds`: pairs [1, N, 2 H]. As a transformers' causal LM for the rest."""
        embedded, states = inputs_embeds.chunk(2, -1)
        if self.blank_first:
            embedded = embedded.masked_fill((position_ids == 0)[..., None], 0)
        joined = self.fc(torch.cat([self.embedding_norm(embedded), self.state_norm(states)], -1))
        (normed,) = self.model(joined, position_ids, past_key_values, attention_mask)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutput(logits=self.logits(normed[:, keep]))
