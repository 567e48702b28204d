"""Hydra heads (arXiv 2402.05109): Medusa's, but each reads the tokens of its path as well.

Head i reads the target's last state, the embedding of the row's newest token and those of the i drafted tokens above
the one it predicts, side by side. Hydra++ has a prefix layer: the states first pass one decoder layer of their own,
with keys and values of accepted positions only.

Legend: N places, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import LlamaModel, LlamaRotaryEmbedding

from draftsmith.infer.heads.rotary import KeptRotary


class HydraBlock(nn.Module):
    """A z + SiLU(B z); the blocks after a head's first one, which keep the width, have z itself for A z."""

    def __init__(self, wide: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(wide, width)
        self.res_connection = nn.Linear(wide, width) if wide != width else nn.Identity()

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.res_connection(given) + nn.functional.silu(self.linear(given))
        return out


class HydraHead(nn.Module):
    """Head `number`, counted from 0."""

    def __init__(self, number: int, width: int, vocab_size: int, num_layers: int) -> None:
        super().__init__()
        later = [HydraBlock(width, width) for _ in range(num_layers - 1)]
        self.blocks = nn.ModuleList([HydraBlock((number + 2) * width, width), *later])
        self.lm_head = nn.Linear(width, vocab_size, bias=True)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            given = block(given)
        out: torch.Tensor = self.lm_head(given)
        return out


class HydraPrefix(nn.Module):
    """The decoder layer and norm of Hydra++, as a ModelRunner runs them: over the target's states at all positions that
    it has read. What it returns as logits are states, to be given to the heads in place of the target's."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        if config.num_hidden_layers != 1:
            raise ValueError(f"the prefix layer of Hydra heads is one layer, not {config.num_hidden_layers}")
        if config._attn_implementation is None:
            config._attn_implementation = "eager"
        self.config = config
        self.model = LlamaModel(config)
        self.model.embed_tokens = None
        self.model.rotary_emb = KeptRotary(LlamaRotaryEmbedding(config))

    def get_input_embeddings(self) -> None:
        return None

    def get_output_embeddings(self) -> None:
        return None

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
        """`inputs_embeds`: the target's states [1, N, H]."""
        states = self.model(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            use_cache=past_key_values is not None,
        )[0]
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutput(logits=states[:, keep])


class HydraHeads(nn.Module):
    """The heads of one target, whose states and embeddings are `width` wide. `prefix_config`: of the layer that the
    states pass first, with Hydra++."""

    features = ("last",)

    def __init__(
        self,
        width: int,
        vocab_size: int,
        num_heads: int,
        num_layers: int = 1,
        prefix_config: LlamaConfig | None = None,
    ) -> None:
        super().__init__()
        if min(width, vocab_size, num_heads, num_layers) < 1:
            raise ValueError("Hydra heads need a width, a vocabulary, heads and layers of at least 1")
        self.width = width
        self.vocab_size = vocab_size
        self.num_layers = num_layers
        self.prefix = HydraPrefix(prefix_config) if prefix_config is not None else None
        self.heads = nn.ModuleList(HydraHead(i, width, vocab_size, num_layers) for i in range(num_heads))

    def logits(self, number: int, states_NH: torch.Tensor, path: Sequence[torch.Tensor]) -> torch.Tensor:
        """[N, V] of head `number`. `states_NH`: the target's, or what the prefix made of them. `path`: the embeddings
        [N, H] of the newest token and of the `number` tokens drafted after it."""
        assert len(path) == number + 1, "a head reads as many tokens as lie above what it predicts"
        out: torch.Tensor = self.heads[number](torch.cat([states_NH, *path], -1))
        return out
