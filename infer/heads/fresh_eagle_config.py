"""The config of a new EAGLE head: a Llama's, with the sizes of its target where no others are given."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


def fresh_eagle_config(target: Any, num_layers: int = 1, rope_theta: float = 10000.0, **shape: int) -> LlamaConfig:
    """`target`: its text config; `shape`: sizes that differ from the target's. ValueError if they do not divide."""
    width = int(target.hidden_size)
    heads = int(shape.get("num_attention_heads", target.num_attention_heads))
    sizes = {
        "intermediate_size": getattr(target, "intermediate_size", None) or 4 * width,
        "num_attention_heads": heads,
        "num_key_value_heads": min(getattr(target, "num_key_value_heads", None) or heads, heads),
        "head_dim": getattr(target, "head_dim", None) or width // heads,
        **shape,
    }
    if heads % sizes["num_key_value_heads"] or sizes["head_dim"] % 2:
        raise ValueError(
            f"a head of {heads} attention heads, {sizes['num_key_value_heads']} num_key_value_heads and head_dim "
            f"{sizes['head_dim']} does not work: give --shape with sizes that divide, and an even head_dim"
        )
    return LlamaConfig(
        **sizes, hidden_size=width, num_hidden_layers=num_layers, vocab_size=target.vocab_size,
        rms_norm_eps=getattr(target, "rms_norm_eps", None) or 1e-6, tie_word_embeddings=False,
        max_position_embeddings=getattr(target, "max_position_embeddings", None) or 2048,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
    )  # fmt: skip
