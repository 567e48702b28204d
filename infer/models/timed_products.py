"""Products of few tokens on a CPU in the way that this machine takes least time for, by timing.

A linear layer multiplies tokens [N, I] by weights [I, O]. Turned round, [O, I] by [I, N], a product of two float32
tokens can take less than half the time, and then one token is best multiplied as two. Where a processor has no
instructions for 16-bit products, more than a few tokens are best multiplied with float32 copies of the weights: sums
are made in float32 either way, and rounded once. Processors and widths differ (LOG.md has figures), so each way is
timed on the model's own layers, once for a machine.

Legend: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from draftsmith.infer.models.prepack import SHARE_OF_MEMORY, total_memory
from draftsmith.infer.models.remembered import choice_path, remember, remembered

# Numbers of tokens that are timed: products of others are made like those of the next larger number, or of the last.
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 16)
# The last one that products turned round are tried for, and how often each is timed after a warm-up.
MOST, TRIES = 8, 3
# Layers of this many bytes in all are timed: more than caches hold, or a product would seem faster than in a pass.
TIMED_BYTES = 1 << 28
# Smaller models are not worth it.
SMALL = 1 << 24
CLEARLY_LESS = 0.92
HALVES = (torch.bfloat16, torch.float16)

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Way:
    """`wide`: with a float32 copy of the weights. `columns`: as so many tokens, turned round; 0: not turned."""

    wide: bool = False
    columns: int = 0


# By number of tokens; the others keep the layer's own product.
Ways = dict[int, Way]


class TimedProduct:
    """Replaces a linear layer's forward."""

    def __init__(self, layer: torch.nn.Linear, ways: Ways) -> None:
        self.weight_OI, self.bias_O = layer.weight, layer.bias
        self.wide_OI = layer.weight.float() if any(way.wide for way in ways.values()) else layer.weight
        own = Way()
        self.ways = [own, *(ways.get(_size(tokens), own) for tokens in range(1, SIZES[-1] + 1))]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        way = self.ways[min(x.numel() // x.shape[-1], SIZES[-1])]
        if not way.wide and not way.columns:
            return torch.nn.functional.linear(x, self.weight_OI, self.bias_O)
        weight_OI = self.wide_OI if way.wide else self.weight_OI
        bias_O = None if self.bias_O is None else self.bias_O.to(weight_OI.dtype)
        product_NO = product(x.reshape(-1, x.shape[-1]).to(weight_OI.dtype), weight_OI, way.columns)
        if bias_O is not None:
            product_NO = product_NO + bias_O
        return product_NO.to(x.dtype).reshape(*x.shape[:-1], -1)


def product(x_NI: torch.Tensor, weight_OI: torch.Tensor, columns: int) -> torch.Tensor:
    """[N, O] of tokens and weights; `columns`: as of Way."""
    if not columns:
        return torch.nn.functional.linear(x_NI, weight_OI)
    tokens = x_NI.shape[0]
    if columns > tokens:
        x_NI = torch.cat([x_NI, x_NI[:1].expand(columns - tokens, -1)])
    return (weight_OI @ x_NI.t()).t()[:tokens].contiguous()


def is_timed(model: Any) -> bool:
    """Whether `time_products` would do anything."""
    layers = _layers(model)
    return _is_large(layers) and layers[0].weight.device.type == "cpu"


def copied_bytes(model: Any) -> int:
    """The most that copies may take, or 0 where none are made. A model on the meta device is counted too."""
    layers = _layers(model)
    if not _is_large(layers) or layers[0].weight.dtype not in HALVES:
        return 0
    copies = sum(4 * int(layer.weight.numel()) for layer in layers)
    return copies if copies < SHARE_OF_MEMORY * total_memory() else 0


@torch.inference_mode()
def time_products(model: Any) -> None:
    """Replace the products of `model` that are faster in another way, as was measured now or before on this machine."""
    layers = _layers(model)
    by_shape = _by_shape(layers)
    wide = copied_bytes(model) > 0
    dtypes = sorted({str(layer.weight.dtype) for layer in layers})
    path = choice_path("products", sorted((shape, len(own)) for shape, own in by_shape.items()), dtypes, wide)
    ways = _read(remembered(path), by_shape)
    if ways is None:
        ways = fastest(layers, wide)
        remember(path, _written(ways))
    for shape, own in ways.items():
        for layer in by_shape[shape] if own else ():
            layer.forward = TimedProduct(layer, own)


def fastest(layers: Sequence[Any], wide: bool) -> dict[Shape, Ways]:
    """How each shape's products are made, timed in the order in which a pass runs its layers. `wide`: float32 copies
    may be made."""
    timed = _timed(layers)
    found: dict[Shape, Ways] = {shape: {} for shape in _by_shape(layers)}
    kinds = [False, True] if wide else [False]
    copies = {id(layer): layer.weight.float() for layer in timed} if wide else {}
    seconds: dict[tuple[int, Way], dict[Shape, float]] = {}
    for kind in kinds:
        for n in SIZES:
            for columns in (0, n) if n <= MOST else (0,):
                way = Way(kind, columns)
                seconds[n, way] = _seconds(timed, n, way, copies)
    for shape, ways in found.items():
        for n in SIZES:
            tried = {way: own[shape] for (m, way), own in seconds.items() if m == n or (way.columns and m > n)}
            best = min(tried, key=lambda way: tried[way])
            if tried[best] < CLEARLY_LESS * tried[Way()]:
                ways[n] = best
    return found


def _seconds(layers: Sequence[Any], tokens: int, way: Way, copies: dict[int, torch.Tensor]) -> dict[Shape, float]:
    """By shape, the least time that its layers took."""
    dtype = layers[0].weight.dtype
    inputs = {size: torch.ones((tokens, size), dtype=dtype) for size in {layer.in_features for layer in layers}}
    best: dict[Shape, float] = {}
    for attempt in range(TRIES + 1):
        taken = dict.fromkeys(_by_shape(layers), 0.0)
        for layer in layers:
            weight_OI = copies[id(layer)] if way.wide else layer.weight
            began = time.perf_counter()
            product(inputs[layer.in_features].to(weight_OI.dtype), weight_OI, way.columns).to(dtype)
            taken[_shape(layer)] += time.perf_counter() - began
        if attempt:  # the first round warms up
            best = {shape: min(seconds, best.get(shape, seconds)) for shape, seconds in taken.items()}
    return best


def _size(tokens: int) -> int:
    return next((size for size in SIZES if size >= tokens), SIZES[-1])


def _written(ways: dict[Shape, Ways]) -> dict[str, Any]:
    return {
        f"{outputs}x{inputs}": {str(n): [way.wide, way.columns] for n, way in own.items()}
        for (outputs, inputs), own in ways.items()
    }


def _read(known: dict[str, Any], by_shape: dict[Shape, list[Any]]) -> dict[Shape, Ways] | None:
    """What was kept for these shapes; None if nothing, or something else."""
    found: dict[Shape, Ways] = {}
    try:
        for outputs, inputs in by_shape:
            own = known[f"{outputs}x{inputs}"].items()
            found[outputs, inputs] = {int(n): Way(bool(wide), int(columns)) for n, (wide, columns) in own}
    except (KeyError, ValueError, AttributeError, TypeError):
        return None
    return found


def _layers(model: Any) -> list[Any]:
    """The layers whose products may be made in other ways: those of the first one's dtype, to the end."""
    linear = [module for module in model.modules() if type(module) is torch.nn.Linear]
    dtypes = (torch.float32, *HALVES)
    found = [one for one in linear if one.weight.dtype in dtypes and one.weight.device.type in ("cpu", "meta")]
    return [one for one in found if one.weight.dtype == found[0].weight.dtype]


def _is_large(layers: Sequence[Any]) -> bool:
    return sum(layer.weight.nbytes for layer in layers) >= SMALL


def _shape(layer: Any) -> Shape:
    return layer.out_features, layer.in_features


def _by_shape(layers: Sequence[Any]) -> dict[Shape, list[Any]]:
    found: dict[Shape, list[Any]] = {}
    for layer in layers:
        found.setdefault(_shape(layer), []).append(layer)
    return found


def _timed(layers: Sequence[Any]) -> list[Any]:
    """The first layers, up to TIMED_BYTES, and one of each shape that these lack."""
    chosen: list[Any] = []
    held = 0
    shapes: set[Shape] = set()
    for layer in layers:
        if held < TIMED_BYTES or _shape(layer) not in shapes:
            chosen.append(layer)
            held += layer.weight.nbytes
            shapes.add(_shape(layer))
    return chosen
