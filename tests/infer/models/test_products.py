"""Products made in other ways: the same numbers up to rounding, by measurement, undone when asked."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folders import tiny_llama

from draftsmith.infer import Engine, HFTarget
from draftsmith.infer.models import timed_products
from draftsmith.infer.models.prepack import can_prepack
from draftsmith.infer.models.products import added_bytes, own_products, replace_products, restore_products
from draftsmith.infer.models.timed_products import SIZES, TimedProduct, Way, fastest, time_products

SHAPES = [(1, 1, 24), (1, 24), (2, 2, 24), (1, 4, 24)]
WAYS = [Way(False, 1), Way(False, 2), Way(False, 5), Way(True, 0), Way(True, 1), Way(True, 4)]
# No product has fewer columns than tokens.
MADE = [(shape, way) for shape in SHAPES for way in WAYS if not 0 < way.columns < prod(shape[:-1])]


@pytest.fixture
def worth_timing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tiny models count as large ones, on a processor that is to be timed."""
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(timed_products, "SMALL", 1)
    monkeypatch.setattr("draftsmith.infer.models.prepack.multiplies_bfloat16", lambda: False)


def replaced(model: Any) -> list[TimedProduct]:
    found = [layer.__dict__.get("forward") for layer in model.modules()]
    return [one for one in found if isinstance(one, TimedProduct)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "way"), MADE, ids=str)
def test_a_product_is_the_layers_own(shape: tuple[int, ...], way: Way, bias: bool, dtype: torch.dtype) -> None:
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


def test_numbers_between_the_timed_ones_are_made_like_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    plain = timed_products.product

    def noted(x: torch.Tensor, weight: torch.Tensor, columns: int) -> torch.Tensor:
        asked.append((len(x), columns))
        return plain(x, weight, columns)

    monkeypatch.setattr(timed_products, "product", noted)
    made = TimedProduct(torch.nn.Linear(8, 8), {2: Way(False, 3), 16: Way(True, 0)})
    for tokens in (1, 2, 3, 8, 9, 15, 16, 17, 200):
        made(torch.ones(1, tokens, 8))
    assert asked == [(2, 3), (9, 0), (15, 0), (16, 0), (17, 0), (200, 0)]


def test_the_fastest_way_of_each_shape_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With given times: one token of the first shape is best multiplied as two, many with copies; the other shape is
    left alone, for what is only a little faster is not worth other numbers."""
    layers = [torch.nn.Linear(8, 16, dtype=torch.bfloat16), torch.nn.Linear(16, 8, dtype=torch.bfloat16)]

    def seconds(timed: Any, tokens: int, way: Way, copies: dict[int, torch.Tensor]) -> dict[Any, float]:
        assert (len(copies) > 0) >= way.wide
        first = 10.0 * tokens
        if way == Way(False, 2):
            first = 4.0
        if way == Way(True, 0):
            first = 50.0
        return {(16, 8): first, (8, 16): 9.9 * tokens if way.wide else 10.0 * tokens}

    monkeypatch.setattr(timed_products, "_seconds", seconds)
    expected = {1: Way(False, 2), 2: Way(False, 2)} | {n: Way(True, 0) for n in (6, 7, 8, 16)}
    assert fastest(layers, wide=True) == {(16, 8): expected, (8, 16): {}}
    assert fastest(layers, wide=False) == {(16, 8): {1: Way(False, 2), 2: Way(False, 2)}, (8, 16): {}}


def test_every_way_is_timed_on_the_models_layers() -> None:
    model = tiny_llama()
    found = fastest(timed_products._layers(model), wide=False)
    shapes = {(m.out_features, m.in_features) for m in model.modules() if type(m) is torch.nn.Linear}
    assert set(found) == shapes
    for ways in found.values():
        assert set(ways) <= set(SIZES)
        assert all(not way.wide and way.columns >= n for n, way in ways.items())


@pytest.mark.usefixtures("worth_timing")
def test_the_choice_is_timed_once_for_a_machine_and_shapes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second load must not choose otherwise: it would round otherwise."""
    timed: list[bool] = []

    def choose(layers: Any, wide: bool) -> Any:
        timed.append(wide)
        return {(one.out_features, one.in_features): {1: Way(wide, len(timed))} for one in layers}

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
    assert count == sum(type(layer) is torch.nn.Linear for layer in model.modules())
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
    asked: list[bool] = []
    monkeypatch.setattr(timed_products, "fastest", lambda layers, wide: asked.append(wide) or all_ways(layers, wide))
    model = tiny_llama().bfloat16()
    assert not can_prepack(model)
    linear = sum(m.weight.numel() for m in model.modules() if type(m) is torch.nn.Linear)
    assert added_bytes(model) == 4 * linear
    replace_products(model)
    assert sum(one.wide_OI.nbytes for one in replaced(model)) == 4 * linear
    monkeypatch.setattr(timed_products, "total_memory", lambda: 16 * linear)
    assert added_bytes(model) == 0
    time_products(model)
    assert asked == [True, False]
    assert all(one.wide_OI is one.weight_OI for one in replaced(model))


@pytest.mark.usefixtures("worth_timing")
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_decoding_gives_the_same_text(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    monkeypatch.setattr(timed_products, "fastest", all_ways)
    model = tiny_llama()
    prompt = [5, 9, 12, 7] * 5
    asked = {"temperature": temperature, "seed": 3, "max_new_tokens": 40}
    (wanted,) = Engine(HFTarget(model)).generate([prompt], **asked)
    replace_products(model)
    assert replaced(model)
    (ours,) = Engine(HFTarget(model), drafter="pld").generate([prompt], **asked)
    assert ours.token_ids == wanted.token_ids
    assert temperature or len(ours.traces) < 40


def all_ways(layers: Any, wide: bool) -> dict[tuple[int, int], dict[int, Way]]:
    ways = {n: Way(wide and n > 3, 0 if n > 8 else n + n % 2) for n in SIZES}
    return {(one.out_features, one.in_features): ways for one in layers}
