"""A head over pairs and its target: what heads have in common, and whether one fits.

Legend: N pairs, W width of the target's states, H width of the head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from draftsmith.infer.contract.protocols import Target
from draftsmith.infer.models.layers import find_parts, stack_path


class PairHead(Protocol):
    """What infer/heads/eagle.py and mtp.py have in common. `feature_width`: of the target's states."""

    features: tuple[str, ...]
    recurrent: str
    ids_V: torch.Tensor | None
    config: Any
    feature_width: int

    def lend(self, embedding: nn.Module, head: nn.Module | None, scale: float = 1.0, softcap: float = 0.0) -> None: ...

    def joined(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor: ...

    def pairs(self, tokens_N: torch.Tensor, states_NH: torch.Tensor) -> torch.Tensor: ...


# The head for a target, and the folder or name that it came from.
LoadHead = Callable[[Target], tuple[Any, str]]


def check_head(what: str, head: PairHead, target: Target) -> None:
    """ValueError unless this head reads this target's states."""
    assert target.model is not None
    text = target.model.config.get_text_config()
    if head.feature_width != text.hidden_size:
        raise ValueError(
            f"{what} reads states of width {head.feature_width}, and the target's are {text.hidden_size} wide: it is "
            "the head of another target"
        )
    last = max((int(name.partition(":")[2]) for name in head.features if name.startswith("layer:")), default=0)
    if last > text.num_hidden_layers:
        raise ValueError(f"{what} reads layer:{last}, and the target has {text.num_hidden_layers} layers")
    if head.ids_V is not None and int(head.ids_V.max()) >= target.vocab_size:
        raise ValueError(f"{what} drafts token {int(head.ids_V.max())}, and the target has {target.vocab_size} tokens")
    if stack_path(head) != "model.layers":
        raise ValueError(f"{what} has as many norms of features as layers, which cannot be distinguished")


def lend(what: str, head: Any, target: Any) -> None:
    """Give the head what it lacks: the target's embedding, and its output head."""
    embedding = target.get_input_embeddings()
    head.lend(embedding, None)
    rows, width = head.get_input_embeddings().weight.shape
    if rows < embedding.weight.shape[0]:
        raise ValueError(f"{what} embeds {rows} tokens, and the target has {embedding.weight.shape[0]}")
    if width != head.config.hidden_size:
        raise ValueError(
            f"{what} is {head.config.hidden_size} wide and has no embedding of its own; the target's is {width} wide"
        )
    if head.get_output_embeddings() is None:
        parts = find_parts(target)
        head.lend(embedding, parts.head, parts.scale, parts.softcap)
