"""A draft model made from its target: the first layers, evenly spaced ones, or another shape; what fits is copied.

Embeddings, final norm and head are the target's, or their projection where the width differs (projection.py). Shapes
are shapes.py's; data and training are not known here.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from draftsmith.infer.models.layers import find_parts, picked_config, stack_path
from draftsmith.train.drafts.projection import project_embeddings
from draftsmith.train.drafts.shapes import reshaped


def pick_layers(how: str, num_layers: int, of: int) -> list[int]:
    """Which of the target's layers a draft of `num_layers` begins as."""
    if not 1 <= num_layers <= of:
        raise ValueError(f"num_layers is {num_layers}: a draft cut from this target has 1 to {of} layers")
    if how == "first":
        return list(range(num_layers))
    if how == "even":
        return [round(i * (of - 1) / (num_layers - 1)) for i in range(num_layers)] if num_layers > 1 else [0]
    raise ValueError(f"unknown initialisation {how!r}: first, even, fresh, or the folder of a draft")


def init_draft(
    target: Any,
    *,
    num_layers: int,
    how: str = "first",
    shape: dict[str, int] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A draft of `target` in `dtype`. `how`: first or even layers of the target, fresh ones at random, or the folder of
    a draft that was trained before. With `shape` (hidden_size, ...) tensors of another shape than the target's are
    fresh; embeddings and head of another width are projected."""
    if Path(how).is_dir():
        return _trained_before(target, how, num_layers, shape or {}, dtype)
    config_of = target.config.get_text_config()
    count = config_of.num_hidden_layers
    other_width = (shape or {}).get("hidden_size", config_of.hidden_size) != config_of.hidden_size
    if other_width and how != "fresh":
        raise ValueError("another width has no use for the target's layers: such a shape goes with init fresh")
    if how == "fresh":
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}: a draft has at least one layer")
        picked = [i % count for i in range(num_layers)]
    else:
        picked = pick_layers(how, num_layers, count)
    config = reshaped(picked_config(target.config, picked), shape or {})
    config.dtype = dtype
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        draft = type(target)(config).to(dtype)
    draft.generation_config = copy.deepcopy(target.generation_config)
    _copy(target, draft, None if how == "fresh" else picked, whole=not shape)
    if other_width:
        project_embeddings(target, draft)
    return draft


def _trained_before(target: Any, folder: str, num_layers: int, shape: dict[str, int], dtype: torch.dtype) -> Any:
    """The draft in `folder`, to be trained on."""
    from draftsmith.infer.models.load import load_model

    draft, _ = load_model(folder, device="cpu")
    config = draft.config.get_text_config()
    if config.vocab_size != target.config.get_text_config().vocab_size:
        raise ValueError(f"{folder} has a vocabulary of {config.vocab_size} tokens, which is not the target's")
    wanted = {"num_hidden_layers": num_layers, **shape}
    have = {name: getattr(config, name, None) for name in wanted}
    other = [f"{name} {have[name]}, not {size}" for name, size in wanted.items() if have[name] != size]
    if other:
        raise ValueError(f"{folder} has {', '.join(other)}: a draft goes on in its own shape")
    return draft.to(dtype)


@torch.no_grad()
def _copy(target: Any, draft: Any, picked: Sequence[int] | None, whole: bool) -> None:
    """Copy all tensors of the same name and shape; layer i of the draft takes the target's layer picked[i]. `whole`:
    every tensor has to have its like."""
    path = stack_path(target) + "."
    have = target.state_dict()
    for name, tensor in draft.state_dict().items():
        source: str | None = name
        if name.startswith(path):
            number, _, rest = name.removeprefix(path).partition(".")
            source = None if picked is None else f"{path}{picked[int(number)]}.{rest}"
        if source in have and have[source].shape == tensor.shape:
            tensor.copy_(have[source])
        elif picked is not None and whole:
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
