"""What all heads over pairs have in common: they borrow from their target what they lack, and run as a causal LM does.

Legend: N pairs, H width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from draftsmith.infer.models.layers import shaped_logits


class PairModule(nn.Module):
    """A head as a ModelRunner runs it. `model` is its stack of layers with the final norm; `embed_tokens` and `lm_head`
    are its own embedding and output head, or None."""

    model: Any
    embed_tokens: nn.Module | None
    lm_head: nn.Linear | None

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = self.lm_head = None
        self._lent: tuple[Any, ...] = (None, None)
        self._shaping = (1.0, 0.0)

    def lend(self, embedding: nn.Module, head: nn.Module | None, scale: float = 1.0, softcap: float = 0.0) -> None:
        """Take the target's embedding and head for those that this head lacks; they are not among its parameters."""
        self._lent = (embedding, head)
        if self.lm_head is None:
            self._shaping = (scale, softcap)

    def get_input_embeddings(self) -> Any:
        return self.embed_tokens if self.embed_tokens is not None else self._lent[0]

    def get_output_embeddings(self) -> Any:
        return self.lm_head if self.lm_head is not None else self._lent[1]

    def pairs(self, tokens_N: torch.Tensor, states_NH: torch.Tensor) -> torch.Tensor:
        """[N, 2 H] what the head is run on: each token's embedding, then the state before it: the target's, or one that
        was fed back."""
        embedded_NH = self.get_input_embeddings()(tokens_N).to(states_NH.dtype)
        return torch.cat([embedded_NH, states_NH], -1)

    def entering(self, pairs: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """What the layers are given of pairs [1, N, 2 H]."""
        raise NotImplementedError

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """[..., V] of states after the final norm."""
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
        given = self.entering(inputs_embeds, position_ids)
        (normed,) = self.model(given, position_ids, past_key_values, attention_mask)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutput(logits=self.logits(normed[:, keep]))
