"""A draft model made from its target: the first or evenly spaced layers, or another shape; matching tensors are copied.

Embeddings, final norm and head are the target's. For a narrower draft, embeddings and head are projected on the
directions that hold most of the second moment of both matrices together (each scaled to the same weight; no mean is
subtracted, because the norm that follows subtracts none). They share one basis because the residual stream carries
states from one to the other, so the products of embeddings with head rows, which dominate a shallow draft, come as
close to the target's as that width allows. The head is multiplied by sqrt(wide / narrow) because the final norm gives
states the length sqrt(width). A wider draft gets the target's columns and zeros.

Legend: V vocabulary, D the target's width, K the draft's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from draftsmith.infer.models.layers import find_parts, picked_config, stack_path
from draftsmith.train.drafts.shapes import reshaped


def pick_layers(how: str, num_layers: int, of: int) -> list[int]:
    """The indices of the target's layers that a draft of `num_layers` starts from."""
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
    """A draft of `target` in `dtype`. `how`: first, even (evenly spaced target layers), fresh (random layers), or the
    folder of a trained draft. With `shape` (hidden_size, ...), tensors whose shape differs from the target's are
    random; embeddings and head of another width are projected."""
    if Path(how).is_dir():
        return _trained_before(target, how, num_layers, shape or {}, dtype)
    config_of = target.config.get_text_config()
    count = config_of.num_hidden_layers
    other_width = (shape or {}).get("hidden_size", config_of.hidden_size) != config_of.hidden_size
    if other_width and how != "fresh":
        raise ValueError("the target's layers do not fit another width: use --init fresh with this hidden_size")
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
    """The draft in `folder`, to continue its training."""
    from draftsmith.infer.models.load import load_model

    draft, _ = load_model(folder, device="cpu")
    config = draft.config.get_text_config()
    if config.vocab_size != target.config.get_text_config().vocab_size:
        raise ValueError(f"{folder} has a vocabulary of {config.vocab_size} tokens, not the target's")
    wanted = {"num_hidden_layers": num_layers, **shape}
    have = {name: getattr(config, name, None) for name in wanted}
    other = [f"{name} {have[name]}, not {size}" for name, size in wanted.items() if have[name] != size]
    if other:
        raise ValueError(f"{folder} has {', '.join(other)}: a trained draft keeps its shape")
    return draft.to(dtype)


@torch.no_grad()
def _copy(target: Any, draft: Any, picked: Sequence[int] | None, whole: bool) -> None:
    """Copy all tensors of the same name and shape; layer i of the draft takes the target's layer picked[i]. `whole`:
    every tensor must have a counterpart."""
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
            raise ValueError(f"the target has no tensor of the shape of {name}: its layers cannot become a draft")


@torch.no_grad()
def project_embeddings(target: Any, draft: Any) -> float:
    """Fill the draft's embeddings and head; returns the share of the second moment that they retain."""
    embedding_VD = target.get_input_embeddings().weight.float()
    head_VD = target.get_output_embeddings().weight.float()
    ours_VK, theirs_VK = draft.get_input_embeddings().weight, draft.get_output_embeddings().weight
    wide, narrow = embedding_VD.shape[1], ours_VK.shape[1]
    tied = ours_VK is theirs_VK
    if narrow >= wide:
        basis_DK, held = torch.eye(wide, narrow), 1.0
    else:
        basis_DK, held = main_directions([embedding_VD] if tied else [embedding_VD, head_VD], narrow)
    basis_DK = basis_DK.to(embedding_VD.device)
    ours_VK.copy_(embedding_VD @ basis_DK)
    if not tied:
        theirs_VK.copy_(head_VD @ basis_DK * math.sqrt(wide / narrow))
    return held


def main_directions(matrices_VD: list[torch.Tensor], count: int) -> tuple[torch.Tensor, float]:
    """([D, count] orthonormal directions, largest first; their share of the second moment)."""
    moments = [matrix_VD.double().T @ matrix_VD.double() for matrix_VD in matrices_VD]
    moment_DD = torch.stack([moment_DD / moment_DD.trace() for moment_DD in moments]).mean(0)
    values_D, vectors_DD = torch.linalg.eigh(moment_DD)
    held = float(values_D[-count:].sum() / values_D.sum())
    return vectors_DD[:, -count:].flip(-1).float(), held


def freeze(model: Any, what: Sequence[str]) -> None:
    """Freeze `embeddings` or `head`. Where the two are one matrix, both must be named."""
    unknown = sorted(set(what) - {"embeddings", "head"})
    if unknown:
        raise ValueError(f"{unknown[0]!r} cannot be frozen; embeddings and head can")
    embeddings, head = model.get_input_embeddings().weight, find_parts(model).head.weight
    if embeddings is head and len(set(what)) == 1:
        raise ValueError("this model's embeddings and head are one matrix: freeze both or neither")
    for name, weight in (("embeddings", embeddings), ("head", head)):
        if name in what:
            weight.requires_grad_(False)
