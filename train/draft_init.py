"""A draft model made from its target: the first layers, evenly spaced ones, or another shape; what fits is copied.

Embeddings, final norm and head are the target's. Data and training are not known here.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from draftsmith.infer.layers import find_parts, picked_config, stack_path

SHAPE = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def pick_layers(how: str, num_layers: int, of: int) -> list[int]:
    """Which of the target's layers a draft of `num_layers` begins as."""
    if not 1 <= num_layers <= of:
        raise ValueError(f"num_layers is {num_layers}: a draft cut from this target has 1 to {of} layers")
    if how == "first":
        return list(range(num_layers))
    if how == "even":
        return [round(i * (of - 1) / (num_layers - 1)) for i in range(num_layers)] if num_layers > 1 else [0]
    raise ValueError(f"unknown initialisation {how!r}: first, even or fresh")


def init_draft(
    target: Any,
    *,
    num_layers: int,
    how: str = "first",
    shape: dict[str, int] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A draft of `target` in `dtype`. `how`: first or even layers of the target, or fresh ones at random; with `shape`
    (hidden_size, ...) of another width, where only what has the target's shape is copied."""
    count = target.config.get_text_config().num_hidden_layers
    if shape and how != "fresh":
        raise ValueError("another width has no use for the target's layers: a shape goes with init fresh")
    if how == "fresh":
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}: a draft has at least one layer")
        picked = [i % count for i in range(num_layers)]
    else:
        picked = pick_layers(how, num_layers, count)
    config = _reshaped(picked_config(target.config, picked), shape or {})
    config.dtype = dtype
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        draft = type(target)(config).to(dtype)
    draft.generation_config = copy.deepcopy(target.generation_config)
    _copy(target, draft, None if how == "fresh" else picked)
    return draft


def _reshaped(config: Any, shape: dict[str, int]) -> Any:
    text = config.get_text_config()
    for name, value in shape.items():
        if name not in SHAPE or not hasattr(text, name):
            raise ValueError(f"{config.model_type} has no shape {name!r}; known are {', '.join(SHAPE)}")
        setattr(text, name, value)
    if shape and "head_dim" not in shape and getattr(text, "head_dim", None):
        text.head_dim = text.hidden_size // text.num_attention_heads
    return config


@torch.no_grad()
def _copy(target: Any, draft: Any, picked: Sequence[int] | None) -> None:
    """Copy all tensors of the same name and shape; layer i of the draft takes the target's layer picked[i]."""
    path = stack_path(target) + "."
    have = target.state_dict()
    for name, tensor in draft.state_dict().items():
        source: str | None = name
        if name.startswith(path):
            number, _, rest = name.removeprefix(path).partition(".")
            source = None if picked is None else f"{path}{picked[int(number)]}.{rest}"
        if source in have and have[source].shape == tensor.shape:
            tensor.copy_(have[source])
        elif picked is not None:
            raise ValueError(f"the target has nothing of the shape of {name}: it cannot be cut into a draft")


def freeze(model: Any, what: Sequence[str]) -> None:
    """Keep the target's `embeddings` or `head` as they are. Where the two are one matrix, both must be named."""
    unknown = sorted(set(what) - {"embeddings", "head"})
    if unknown:
        raise ValueError(f"{unknown[0]!r} cannot be frozen; embeddings and head can")
    embeddings, head = model.get_input_embeddings().weight, find_parts(model).head.weight
    if embeddings is head and len(set(what)) == 1:
        raise ValueError("this model's embeddings and head are one matrix: freeze both or neither")
    for name, weight in (("embeddings", embeddings), ("head", head)):
        if name in what:
            weight.requires_grad_(False)
