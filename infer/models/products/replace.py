"""The products of a loaded model's linear layers on a CPU: replaced by faster ones of the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from draftsmith.infer.models.products.joined import JoinedPart, join_layers
from draftsmith.infer.models.products.prepack import PackedProduct, can_prepack, packed_bytes, prepack
from draftsmith.infer.models.products.timed import TimedProduct, copied_bytes, is_timed, time_products


def replace_products(model: Any) -> None:
    """On a CPU, layers of one input joined, and packed bfloat16 weights, or else what is timed to be faster; only for a
    model whose weights will not change."""
    join_layers(model)
    if can_prepack(model):
        prepack(model)
    elif is_timed(model):
        time_products(model)


def added_bytes(model: Any) -> int:
    """The most that `replace_products` adds to the weights in memory. A model on the meta device is counted as if it
    were on the CPU."""
    return packed_bytes(model) or copied_bytes(model)


def restore_products(model: Any) -> None:
    """Undo `replace_products`: the model's own weights and products are used again."""
    for layer in _replaced(model):
        del layer.forward


@contextmanager
def own_products(model: Any) -> Iterator[None]:
    """Run `model` as transformers made it."""
    replaced = [(layer, layer.forward) for layer in _replaced(model)]
    restore_products(model)
    try:
        yield
    finally:
        for layer, forward in replaced:
            layer.forward = forward


def _replaced(model: Any) -> list[Any]:
    ours = (JoinedPart, PackedProduct, TimedProduct)
    return [layer for layer in model.modules() if isinstance(layer.__dict__.get("forward"), ours)]
