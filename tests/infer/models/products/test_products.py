"""Products made in other ways: the same numbers up to rounding, by measurement, undone when asked."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folders import tiny_llama

from draftsmith.infer import Engine, HFTarget
from draftsmith.infer.models.products import timed as timed_products
from draftsmith.infer.models.products.joined import linear_layers
from draftsmith.infer.models.products.prepack import can_prepack
from draftsmith.infer.models.products.replace import added_bytes, own_products, replace_products, restore_products
from draftsmith.infer.models.products.timed import (
    OWN,
    SIZES,
    PackedHalves,
    ProductWay,
    TimedProduct,
    fastest,
    time_products,
)

SHAPES = [(1, 1, 24), (1, 24), (2, 2, 24), (1, 4, 24)]
TURNED = [ProductWay(columns=1), ProductWay(columns=2), ProductWay(columns=5)]
# No product has fewer columns than tokens.
MADE = [(shape, torch.float32, way) for shape in SHAPES for way in TURNED if way.columns >= prod(shape[:-1])]
MADE += [(shape, dtype, ProductWay(packed=True)) for shape in SHAPES for dtype in (torch.bfloat16, torch.float16)]


@pytest.fixture
def worth_timing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tiny models count as large ones, on a processor that is to be timed."""
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(timed_products, "SMALL", 1)
    monkeypatch.setattr("draftsmith.infer.models.products.prepack.multiplies_bfloat16", lambda: False)


def replaced(model: Any) -> list[TimedProduct]:
    found = [layer.__dict__.get("forward") for layer in linear_layers(model)]
    return [one for one in found if isinstance(one, TimedProduct)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "dtype", "way"), MADE, ids=str)
def test_a_product_is_the_layers_own(shape: tuple[int, ...], dtype: torch.dtype, way: ProductWay, bias: bool) -> None:
    torch.manual_seed(len(shape))
    layer = torch.nn.Linear(24, 40, bias=bias, dtype=dtype)
    x = torch.randn(shape).to(dtype)
    tokens = x.numel() // 24
    with torch.inference_mode():
        wanted = layer.double()(x.double())
        ours = TimedProduct(layer.to(dtype), {tokens: way})(x)
    assert ours.dtype == dtype
    assert ours.shape == wanted.shape
    assert ours.is_contiguous()
    assert (ours - wanted).abs().max() < 4 * torch.finfo(dtype).eps * wanted.abs().max()


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_packed_weights_are_exact_whatever_their_size(scale: float) -> None:
    """bfloat16 has float32's range, float16 has not: products of one input each show every weight."""
    torch.manual_seed(0)
    weight_OI = (torch.randn(64, 32) * torch.logspace(0, -6, 32) * scale).bfloat16()
    ours_IO = PackedHalves(weight_OI).product(torch.eye(32))
    assert torch.equal(ours_IO.t(), weight_OI.float())


def test_the_smallest_weights_beside_large_ones_are_off_by_less_than_sums_are() -> None:
    weight_OI = torch.tensor([[1.0, 2.0**-30 * 1.5, 2.0**-34 * 1.25]]).bfloat16()
    ours = PackedHalves(weight_OI.repeat(32, 11)[:, :32]).product(torch.eye(32))[:3, 0]
    assert torch.equal(ours[:2], weight_OI[0, :2].float())
    assert (ours[2] - weight_OI[0, 2].float()).abs() < 2.0**-38


def test_zeros_are_packed() -> None:
    assert torch.equal(PackedHalves(torch.zeros(32, 32).bfloat16()).product(torch.ones(1, 32)), torch.zeros(1, 32))


@pytest.mark.usefixtures("worth_timing")
def test_weights_that_are_not_finite_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed_products, "fastest", all_ways)
    model = tiny_llama().bfloat16()
    first, second = (layer.self_attn for layer in model.model.layers)
    first.o_proj.weight.data[2, 5] = second.v_proj.weight.data[2, 5] = torch.inf
    replace_products(model)
    linear = linear_layers(model)
    kept = [layer for layer in linear if "forward" not in layer.__dict__]
    assert kept == [first.o_proj, second.v_proj.forward.whole.layer]
    assert len(replaced(model)) == len(linear) - 2


def test_numbers_between_the_timed_ones_are_made_like_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ProductWay]] = []
    plain = timed_products.product

    def noted(x: torch.Tensor, weight: torch.Tensor, packed: Any, way: ProductWay) -> torch.Tensor:
        asked.append((len(x), way))
        return plain(x, weight, packed, way)

    monkeypatch.setattr(timed_products, "product", noted)
    two, many = ProductWay(columns=3), ProductWay(packed=True)
    made = TimedProduct(torch.nn.Linear(8, 8), {2: two, 16: many})
    for tokens in (1, 2, 3, 8, 9, 15, 16, 17, 200):
        made(torch.ones(1, tokens, 8))
    assert asked == [(2, two)] + [(tokens, many) for tokens in (9, 15, 16, 17, 200)]


def test_the_fastest_way_of_each_shape_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With given times: one token of the first shape is best multiplied as two; the other shape is left alone, for
    what is only a little faster is not worth other numbers."""
    layers = [torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)]

    def seconds(timed: Any, packed: Any, tokens: int, way: ProductWay) -> dict[Any, float]:
        first = 4.0 if way == ProductWay(columns=2) else 50.0 if way.packed else 10.0 * tokens
        return {(16, 8): first, (8, 16): (9.9 if way.packed else 10.0) * tokens}

    monkeypatch.setattr(timed_products, "_seconds", seconds)
    two, many = ProductWay(columns=2), ProductWay(packed=True)
    tried = {n: [OWN, ProductWay(columns=n)] for n in SIZES}
    assert fastest(layers, tried) == {(16, 8): {1: two, 2: two}, (8, 16): {}}
    tried = {n: [OWN, many] for n in SIZES}
    assert fastest(layers, tried) == {(16, 8): dict.fromkeys((6, 7, 8, 16), many), (8, 16): {}}


def test_every_way_is_timed_on_the_models_layers() -> None:
    model = tiny_llama()
    found = fastest(timed_products._layers(model), timed_products._tried(torch.float32, False))
    shapes = {(m.out_features, m.in_features) for m in model.modules() if type(m) is torch.nn.Linear}
    assert set(found) == shapes
    for ways in found.values():
        assert set(ways) <= set(SIZES)
        assert all(not way.packed and way.columns >= n for n, way in ways.items())


@pytest.mark.usefixtures("worth_timing")
def test_the_choice_is_timed_once_for_a_machine_and_shapes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second load must not choose otherwise: it would round otherwise."""
    timed: list[bool] = []

    def choose(layers: Any, tried: dict[int, list[ProductWay]]) -> Any:
        timed.append(ProductWay(packed=True) in tried[16])
        return {(one.out_features, one.in_features): {1: ProductWay(False, len(timed))} for one in layers}

    monkeypatch.setattr(timed_products, "fastest", choose)

    def load(dtype: torch.dtype = torch.float32, **shape: int) -> list[int]:
        model = tiny_llama(**shape).to(dtype)
        replace_products(model)
        return sorted({one.ways[1].columns for one in replaced(model)})

    assert [load(), load()] == [[1], [1]]
    assert [load(num_hidden_layers=3), load()] == [[2], [1]]
    assert [load(torch.bfloat16), load(torch.bfloat16)] == [[3], [3]]
    assert timed == [False, False, True]
    for path in (tmp_path / "cache" / "products").rglob("*.json"):
        path.write_text('{"48x32": {"1": 7}}')
    assert load() == [4], "what cannot be read is timed again"
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("no folder")
    assert load() == [5], "what cannot be kept is used all the same"


@pytest.mark.usefixtures("worth_timing")
def test_products_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed_products, "fastest", all_ways)
    model = tiny_llama()
    replace_products(model)
    count = len(replaced(model))
    assert count == len(linear_layers(model))
    with own_products(model):
        assert not replaced(model)
    assert len(replaced(model)) == count
    restore_products(model)
    assert not replaced(model)


@pytest.mark.usefixtures("worth_timing")
def test_what_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed_products, "fastest", all_ways)
    exact = tiny_llama().double()
    replace_products(exact)
    assert not replaced(exact), "float64 was asked for to be exact"
    monkeypatch.setattr(timed_products, "SMALL", 1 << 40)
    small = tiny_llama()
    replace_products(small)
    assert not replaced(small)
    assert added_bytes(small.bfloat16()) == 0


@pytest.mark.usefixtures("worth_timing")
def test_copies_are_made_within_a_share_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[ProductWay]] = []

    def noted(layers: Any, tried: dict[int, list[ProductWay]]) -> Any:
        asked.append(tried[1])
        return all_ways(layers, tried)

    monkeypatch.setattr(timed_products, "fastest", noted)
    model = tiny_llama().bfloat16()
    assert not can_prepack(model)
    linear = sum(m.weight.numel() for m in model.modules() if type(m) is torch.nn.Linear)
    assert added_bytes(model) == 2 * linear
    replace_products(model)
    assert all(one.packed for one in replaced(model))
    monkeypatch.setattr(timed_products, "total_memory", lambda: 8 * linear)
    assert added_bytes(model) == 0
    time_products(model)
    assert asked == [[OWN, ProductWay(packed=True)], [OWN]]
    assert not any(one.packed for one in replaced(model))
    monkeypatch.setattr(timed_products, "can_pack", lambda: False)
    monkeypatch.setattr(timed_products, "total_memory", lambda: 1 << 60)
    assert added_bytes(model) == 0, "no FBGEMM on this processor"


@pytest.mark.usefixtures("worth_timing")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_decoding_gives_the_same_text(monkeypatch: pytest.MonkeyPatch, temperature: float, dtype: torch.dtype) -> None:
    monkeypatch.setattr(timed_products, "fastest", all_ways)
    model = tiny_llama().to(dtype)
    prompt = [5, 9, 12, 7] * 5
    asked = {"temperature": temperature, "seed": 3, "max_new_tokens": 40}
    (wanted,) = Engine(HFTarget(model)).generate([prompt], **asked)
    replace_products(model)
    assert replaced(model)
    (ours,) = Engine(HFTarget(model), drafter="pld").generate([prompt], **asked)
    assert ours.token_ids == wanted.token_ids
    assert temperature or len(ours.traces) < 40


def all_ways(layers: Any, tried: dict[int, list[ProductWay]]) -> dict[tuple[int, int], dict[int, ProductWay]]:
    """The last way of each number of tokens, the layer's own where that is the only one."""
    ways = {n: own[-1] for n, own in tried.items()}
    return {(one.out_features, one.in_features): ways for one in layers}
