"""EAGLE heads: one decoder layer, or few, over pairs of a target's state and the token that follows it.

Version 1 (arXiv 2401.15077; version 2, 2406.16858, has the same weights) reads the target's last state and predicts the
next one, to which the target's own head is applied. Version 3 (2503.01840) reads states of several layers and has its
own head, often for a part of the vocabulary. Pair i of a row is the state at position i with token i + 1; it predicts
token i + 2. Below a pair that was drafted, the head's own output is used in place of the target's state.

A head runs in a ModelRunner (models/runner): `pairs` makes the states that it is run on, and `recurrent` names the
state that comes back.

Legend: N pairs, F features, W width of the target's states, H width of the head, V draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3MLP

from draftsmith.infer.heads.pair_module import PairModule
from draftsmith.infer.heads.rotary import KeptRotary

HeadConfig: TypeAlias = LlamaConfig | Qwen3Config
# Whose decoder layers a head may have, by its config's model_type. Qwen3's norm queries and keys.
LAYERS: dict[str, tuple[Any, Any, Any]] = {
    "llama": (LlamaAttention, LlamaMLP, LlamaDecoderLayer),
    "qwen3": (Qwen3Attention, Qwen3MLP, Qwen3DecoderLayer),
}


def default_features(target_layers: int) -> tuple[str, str, str]:
    """The states that an EAGLE-3 head reads unless it says otherwise: before layers 2, L // 2 and L - 3."""
    return f"layer:{2}", f"layer:{target_layers // 2}", f"layer:{target_layers - 3}"


@dataclass(frozen=True, slots=True)
class EagleDesign:
    """How a head is wired, besides the sizes in its config: Llama's, or Qwen3's.

    `features`: the target's states that it reads, in order, each `feature_width` wide. The switches are of version 3.
    `norm_before_residual`: the layer's residual is the normed state. `norm_output`: the final norm's output, not its
    input, is fed back. `norm_before_fc`: one norm over all features before they are joined; `fc_norm`: one for each.
    """

    version: int
    features: tuple[str, ...]
    feature_width: int
    fc_bias: bool = False
    norm_before_residual: bool = False
    norm_output: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False

    def __post_init__(self) -> None:
        if self.version not in (1, 3):
            raise ValueError(f"EAGLE version {self.version}: 1 (whose weights version 2 shares) or 3")
        if self.norm_before_fc and self.fc_norm:
            raise ValueError("norm_before_fc and fc_norm: a head has one norm over all its states, or one for each")
        if self.version == 1 and self.features != ("last",):
            raise ValueError(f"an EAGLE-1 head reads the target's last state, not {', '.join(self.features)}")


class EagleAttentionLayer(nn.Module):
    """The first layer. Of version 3: attention over the normed embedding and the normed state side by side, 2 H wide;
    of version 1: a decoder layer without a norm before its attention."""

    def __init__(self, config: HeadConfig, design: EagleDesign) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.design = design
        attention, mlp, _ = LAYERS[config.model_type]
        self.self_attn = attention(config, 0)
        if design.version == 3:
            for name in ("q_proj", "k_proj", "v_proj"):
                old = getattr(self.self_attn, name)
                setattr(self.self_attn, name, nn.Linear(2 * width, old.out_features, bias=old.bias is not None))
            self.input_layernorm = LlamaRMSNorm(width, eps)
            self.hidden_norm = LlamaRMSNorm(width, eps)
        self.post_attention_layernorm = LlamaRMSNorm(width, eps)
        self.mlp = mlp(config)

    def inlet(self, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What its attention reads, and the residual, of the states or pairs that it is given."""
        if self.design.version == 1:
            return given, given
        embedded, states = given.chunk(2, -1)
        normed = self.hidden_norm(states)
        residual = normed if self.design.norm_before_residual else states
        return torch.cat([self.input_layernorm(embedded), normed], -1), residual

    def forward(self, given: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended, residual = self.inlet(given)
        states = residual + self.self_attn(attended, **kwargs)[0]
        out: torch.Tensor = states + self.mlp(self.post_attention_layernorm(states))
        return out


class EagleStack(nn.Module):
    """The layers and the final norm, which version 1 does not have."""

    def __init__(self, config: HeadConfig, design: EagleDesign) -> None:
        super().__init__()
        if config._attn_implementation is None:
            config._attn_implementation = "eager"
        kind = LAYERS[config.model_type][2]
        later = [kind(config, i) for i in range(1, config.num_hidden_layers)]
        self.layers = nn.ModuleList([EagleAttentionLayer(config, design), *later])
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps) if design.version == 3 else nn.Identity()
        self.rotary_emb = KeptRotary(LlamaRotaryEmbedding(config))

    def forward(
        self, states: torch.Tensor, position_ids: torch.Tensor, past_key_values: Any, attention_mask: Any
    ) -> tuple[torch.Tensor]:
        rotation = self.rotary_emb(states, position_ids)
        for layer in self.layers:
            states = layer(
                states,
                position_embeddings=rotation,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        return (self.norm(states),)


class EagleHead(PairModule):
    """A head, as a ModelRunner runs it. The target lends what the head does not have: `lend`.

    `ids_V`: the target's token id of each id of the draft vocabulary, if that is a part of the target's.
    """

    ids_V: torch.Tensor | None

    def __init__(
        self,
        config: HeadConfig,
        design: EagleDesign,
        ids_V: torch.Tensor | None = None,
        own_embedding: bool = False,
        own_head: bool = True,
    ) -> None:
        super().__init__()
        width, wide = config.hidden_size, design.feature_width
        self.config = config
        self.design = design
        if design.version == 3:
            joined = len(design.features) * wide
            self.fc = nn.Linear(joined, width, bias=design.fc_bias)
            self.input_norm = LlamaRMSNorm(joined, config.rms_norm_eps) if design.norm_before_fc else None
            norms = [LlamaRMSNorm(wide, config.rms_norm_eps) for _ in design.features] if design.fc_norm else []
            self.fc_norms = nn.ModuleList(norms)
        else:
            self.fc = nn.Linear(width + wide, width, bias=design.fc_bias)
        self.model = EagleStack(config, design)
        rows = config.vocab_size if ids_V is None else len(ids_V)
        self.lm_head = nn.Linear(width, rows, bias=False) if own_head else None
        self.embed_tokens = nn.Embedding(config.vocab_size, width) if own_embedding else None
        self.register_buffer("ids_V", ids_V, persistent=False)

    @property
    def features(self) -> tuple[str, ...]:
        return self.design.features

    @property
    def feature_width(self) -> int:
        return self.design.feature_width

    @property
    def recurrent(self) -> str:
        """The tap on the state that is fed back (models/runner/taps.py)."""
        normed = self.design.norm_output or self.design.version == 1
        return "last" if normed else f"layer:{self.config.num_hidden_layers}"

    def joined(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[N, H] what pairs hold of the target's states [N, W] by name."""
        states = [features[name] for name in self.design.features]
        if self.design.version == 1:
            return states[0]
        if len(self.fc_norms):
            states = [norm(state) for norm, state in zip(self.fc_norms, states)]
        joined = torch.cat(states, -1)
        fused: torch.Tensor = self.fc(joined if self.input_norm is None else self.input_norm(joined))
        return fused

    def entering(self, pairs: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return pairs if self.design.version == 3 else self.fc(pairs)


def rows_of(ids_V: Sequence[int], vocab_size: int) -> torch.Tensor:
    """A draft vocabulary as the target's token ids, ascending; ValueError if they are not ids, or one comes twice."""
    found = sorted(ids_V)
    if not found or found[0] < 0 or found[-1] >= vocab_size or len(set(found)) < len(found):
        raise ValueError(f"a draft vocabulary is a set of token ids below {vocab_size}")
    return torch.tensor(found)
