"""Draft shapes: any width, depth and heads of the target's family, and the published ones by name.

"Decoding Speculative Decoding" (arXiv 2402.01528) drafts for LLaMA with its 7B model's width and few layers: 290M, 543M
and 796M count the layers alone; with embeddings and head they have 465M, 869M and 1.27B parameters. Its deep and narrow
1.3B is Sheared-LLaMA's shape (2310.06694). wide-1, wide-3 and wide-5 are the same idea at the target's own width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SHAPE = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")


@dataclass(frozen=True, slots=True)
class PublishedShape:
    """`sizes`: names of SHAPE; sizes that are not named are the target's."""

    num_layers: int
    sizes: dict[str, int] = field(default_factory=dict)


_LLAMA_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32
}  # fmt: skip
_SHEARED = {
    "hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16, "num_key_value_heads": 16
}  # fmt: skip

PRESETS = {
    "wide-1": PublishedShape(1),
    "wide-3": PublishedShape(3),
    "wide-5": PublishedShape(5),
    "290M": PublishedShape(1, _LLAMA_7B),
    "543M": PublishedShape(3, _LLAMA_7B),
    "796M": PublishedShape(5, _LLAMA_7B),
    "1.3B": PublishedShape(24, _SHEARED),
}


def find_preset(name: str) -> PublishedShape:
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: {', '.join(PRESETS)}")
    return PRESETS[name]


def reshaped(config: Any, sizes: Mapping[str, int]) -> Any:
    """Change the sizes of `config` in place; head counts and widths that are not named follow."""
    text = config.get_text_config()
    for name, value in sizes.items():
        if name not in SHAPE or not hasattr(text, name):
            raise ValueError(f"{config.model_type} has no size {name!r}; it has {', '.join(SHAPE)}")
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")
    if not sizes:
        return config
    grouped = getattr(text, "num_key_value_heads", None)
    each = grouped and text.num_attention_heads // grouped
    for name, value in sizes.items():
        setattr(text, name, value)
    heads = text.num_attention_heads
    if grouped and "num_key_value_heads" not in sizes:
        text.num_key_value_heads = max(heads // each, 1)
    if "head_dim" not in sizes:
        if text.hidden_size % heads:
            raise ValueError(
                f"hidden_size {text.hidden_size} does not divide by {heads} heads: give num_attention_heads"
            )
        if getattr(text, "head_dim", None):
            text.head_dim = text.hidden_size // heads
    if grouped and heads % text.num_key_value_heads:
        raise ValueError(f"{heads} heads do not divide by {text.num_key_value_heads} num_key_value_heads")
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    if width % 2:
        raise ValueError(f"heads would be {width} wide, and rotary positions need an even width: give head_dim")
    return config
