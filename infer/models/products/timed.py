"""Products of few tokens on a CPU in the way that this machine takes least time for, by timing.

A linear layer multiplies tokens [N, I] by weights [I, O]. In float32, a product of two tokens can take less than half
the time turned round, [O, I] by [I, N], and then one token is best multiplied as two. 16-bit weights are read fastest
by FBGEMM, as packed float16: on a processor without instructions for 16-bit products, 16 tokens then take a quarter
of the time. All of them multiply the same weights and sum in float32. Processors and widths differ (LOG.md has
figures), so each is timed on the model's own layers, once for a machine.

Legend: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from draftsmith.infer.costs.remembered import choice_path, remember, remembered
from draftsmith.infer.models.products.joined import linear_layers
from draftsmith.infer.models.products.prepack import SHARE_OF_MEMORY, total_memory

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
# Packed weights are scaled by a power of two to below this: those down to 2^-31 of the largest are then exact in
# float16, and smaller ones are off by less than float32 sums are.
LARGEST = 2.0**14

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ProductWay:
    """`packed`: with packed weights. `columns`: the number of tokens to multiply, turned round; 0: not turned."""

    packed: bool = False
    columns: int = 0


OWN = ProductWay()
# By number of tokens; the others keep the layer's own product.
Ways = dict[int, ProductWay]


class PackedHalves:
    """16-bit weights in the order in which FBGEMM reads them; finite ones, for it has no infinities."""

    def __init__(self, weight_OI: torch.Tensor) -> None:
        exact_OI = weight_OI.detach().float()
        largest = float(exact_OI.abs().amax())
        self.scale = 2.0 ** math.floor(math.log2(LARGEST / largest)) if largest else 1.0
        if torch.equal(exact_OI.half().float(), exact_OI):
            self.scale = 1.0
        self._packed = torch.ops.quantized.linear_prepack_fp16(exact_OI * self.scale, None)
        self._product = torch.ops.quantized.linear_dynamic_fp16
        # Tokens are scaled back instead of products, in the operation that makes them float32.
        self._back_1 = torch.tensor([1 / self.scale])

    def product(self, x_NI: torch.Tensor) -> torch.Tensor:
        """[N, O] float32"""
        product_NO: torch.Tensor = self._product(x_NI * self._back_1, self._packed)
        return product_NO


def can_pack() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines


class TimedProduct:
    """Replaces a linear layer's forward."""

    def __init__(self, layer: torch.nn.Linear, ways: Ways) -> None:
        self.weight_OI, self.bias_O = layer.weight, layer.bias
        self.packed = PackedHalves(layer.weight) if any(way.packed for way in ways.values()) else None
        self.ways = [OWN, *(ways.get(_size(tokens), OWN) for tokens in range(1, SIZES[-1] + 1))]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x_NI = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        way = self.ways[min(len(x_NI), SIZES[-1])]
        if way is OWN:
            return torch.nn.functional.linear(x, self.weight_OI, self.bias_O)
        product_NO = product(x_NI, self.weight_OI, self.packed, way)
        if self.bias_O is not None:
            product_NO = product_NO + self.bias_O
        product_NO = product_NO.to(x.dtype)
        return product_NO if x.dim() == 2 else product_NO.view(*x.shape[:-1], -1)


def product(x_NI: torch.Tensor, weight_OI: torch.Tensor, packed: PackedHalves | None, way: ProductWay) -> torch.Tensor:
    """[N, O] of tokens and weights."""
    if way.packed:
        assert packed is not None
        return packed.product(x_NI)
    if not way.columns:
        return torch.nn.functional.linear(x_NI, weight_OI)
    tokens = x_NI.shape[0]
    if way.columns > tokens:
        x_NI = torch.cat([x_NI, x_NI[:1].expand(way.columns - tokens, -1)])
    return (weight_OI @ x_NI.t()).t()[:tokens].contiguous()


def is_timed(model: Any) -> bool:
    """Whether `time_products` would do anything."""
    layers = _layers(model)
    return _is_large(layers) and layers[0].weight.device.type == "cpu"


def copied_bytes(model: Any) -> int:
    """The most that packed weights take, or 0 where none are made. A model on the meta device is counted too."""
    layers = _layers(model)
    if not _is_large(layers) or layers[0].weight.dtype not in HALVES or not can_pack():
        return 0
    copies = sum(int(layer.weight.nbytes) for layer in layers)
    return copies if copies < SHARE_OF_MEMORY * total_memory() else 0


@torch.inference_mode()
def time_products(model: Any) -> None:
    """Replace the products of `model` that are faster in another way, as was measured now or before on this machine."""
    layers = _layers(model)
    by_shape = _by_shape(layers)
    tried = _tried(layers[0].weight.dtype, copied_bytes(model) > 0)
    counts = sorted((shape, len(own)) for shape, own in by_shape.items())
    path = choice_path("products", counts, str(layers[0].weight.dtype), [str(way) for way in tried[SIZES[-1]]])
    ways = _read(remembered(path), by_shape)
    if ways is None:
        ways = fastest(layers, tried)
        remember(path, _written(ways))
    for shape, own in ways.items():
        for layer in by_shape[shape]:
            kept = {n: way for n, way in own.items() if not way.packed or bool(layer.weight.isfinite().all())}
            if kept:
                layer.forward = TimedProduct(layer, kept)


def _tried(dtype: torch.dtype, packed: bool) -> dict[int, list[ProductWay]]:
    """The ways to try for each number of tokens."""
    if dtype in HALVES:
        return {n: [OWN, ProductWay(packed=True)] if packed else [OWN] for n in SIZES}
    return {n: [OWN, ProductWay(columns=n)] if n <= MOST else [OWN] for n in SIZES}


def fastest(layers: Sequence[Any], tried: dict[int, list[ProductWay]]) -> dict[Shape, Ways]:
    """How each shape's products are made, timed in the order in which a pass runs its layers."""
    timed = _timed(layers)
    found: dict[Shape, Ways] = {shape: {} for shape in _by_shape(layers)}
    pack = any(way.packed for ways in tried.values() for way in ways)
    packed = [PackedHalves(torch.ones_like(layer.weight)) if pack else None for layer in timed]
    seconds = {(n, way): _seconds(timed, packed, n, way) for n, ways in tried.items() for way in ways}
    for shape, ways in found.items():
        for n in SIZES:
            # More columns than tokens may be faster.
            own = {way: took[shape] for (m, way), took in seconds.items() if m == n or (way.columns and m > n)}
            best = min(own, key=lambda way: own[way])
            if own[best] < CLEARLY_LESS * own[OWN]:
                ways[n] = best
    return found


def _seconds(
    layers: Sequence[Any], packed: Sequence[PackedHalves | None], tokens: int, way: ProductWay
) -> dict[Shape, float]:
    """By shape, the least time that its layers took."""
    dtype = layers[0].weight.dtype
    inputs = {size: torch.ones((tokens, size), dtype=dtype) for size in {layer.in_features for layer in layers}}
    best: dict[Shape, float] = {}
    for attempt in range(TRIES + 1):
        taken = dict.fromkeys(_by_shape(layers), 0.0)
        for layer, halves in zip(layers, packed):
            began = time.perf_counter()
            product(inputs[layer.in_features], layer.weight, halves, way).to(dtype)
            taken[_shape(layer)] += time.perf_counter() - began
        if attempt:  # the first round warms up
            best = {shape: min(seconds, best.get(shape, seconds)) for shape, seconds in taken.items()}
    return best


def _size(tokens: int) -> int:
    return next((size for size in SIZES if size >= tokens), SIZES[-1])


def _written(ways: dict[Shape, Ways]) -> dict[str, Any]:
    return {
        f"{outputs}x{inputs}": {str(n): [way.packed, way.columns] for n, way in own.items()}
        for (outputs, inputs), own in ways.items()
    }


def _read(known: dict[str, Any], by_shape: dict[Shape, list[Any]]) -> dict[Shape, Ways] | None:
    """What was kept for these shapes; None if nothing, or something else."""
    found: dict[Shape, Ways] = {}
    try:
        for outputs, inputs in by_shape:
            own = known[f"{outputs}x{inputs}"].items()
            found[outputs, inputs] = {int(n): ProductWay(bool(packed), int(columns)) for n, (packed, columns) in own}
    except (KeyError, ValueError, AttributeError, TypeError):
        return None
    return found


def _layers(model: Any) -> list[Any]:
    """The layers whose products may be made in other ways: those of the first one's dtype, to the end."""
    dtypes = (torch.float32, *HALVES)
    found = [
        one for one in linear_layers(model) if one.weight.dtype in dtypes and one.weight.device.type in ("cpu", "meta")
    ]
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
