"""Joined layers give what their parts gave, hold their weights once, and make a product once for an input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import shaken, tiny_model

from draftsmith.infer.drafters.draft_model import follow
from draftsmith.infer.models.hf_target import model_fingerprint
from draftsmith.infer.models.products.int8 import Int8Product, int8_copy
from draftsmith.infer.models.products.joined import JoinedPart, join_layers, linear_layers
from draftsmith.infer.models.products.replace import own_products, replace_products, restore_products

KINDS = ["llama", "mistral", "qwen2", "qwen3"]


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(torch.arange(3, 40)[None], use_cache=False).logits
    return found


def parts(model: Any) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer.__dict__.get("forward"), JoinedPart)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_joined_model_says_what_it_said_and_holds_its_weights_once(kind: str) -> None:
    model = tiny_model(kind)
    wanted, names = logits(model), [name for name, _ in model.named_parameters()]
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fingerprint = model_fingerprint(model)
    join_layers(model)
    assert len(parts(model)) == 2 * 5
    assert (logits(model) - wanted).abs().max() < 1e-12
    assert [name for name, _ in model.named_parameters()] == names
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert model_fingerprint(model) == fingerprint
    held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in model.parameters()}
    assert sum(held.values()) == sum(one.nbytes for one in model.parameters())
    for part in parts(model):
        whole = part.forward.whole.layer.weight
        assert part.weight.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_joined_layers_stand_for_their_parts() -> None:
    model = tiny_model("llama")
    linear = [layer for layer in model.modules() if type(layer) is torch.nn.Linear]
    assert linear_layers(model) == linear
    join_layers(model)
    names = [(layer.out_features, layer.in_features) for layer in linear_layers(model)]
    assert names == [(64, 32), (32, 32), (96, 32), (32, 48)] * 2 + [(61, 32)]
    join_layers(model)  # again changes nothing
    assert len(linear_layers(model)) == 9


def test_a_product_is_made_once_for_an_input_whoever_asks_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", torch.float32)
    attention = model.model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    inputs = [torch.randn(1, 3, 32), torch.randn(3, 32)]
    wanted = [[layer(x) for layer in layers] for x in inputs]
    join_layers(model)
    made = []
    plain = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *others: made.append(x) or plain(x, *others))
    with torch.inference_mode():
        for order, products in (((0, 1, 2), 2), ((2, 0, 1), 4), ((1, 1, 2), 2)):
            made.clear()
            for x, expected in zip(inputs, wanted):
                for index in order:
                    assert (layers[index](x) - expected[index]).abs().max() < 1e-5
            assert len(made) == products


def test_its_own_products_come_back() -> None:
    model = tiny_model("llama")
    wanted = logits(model)
    join_layers(model)
    with own_products(model):
        assert not parts(model)
        assert torch.equal(logits(model), wanted)
    assert len(parts(model)) == 10
    restore_products(model)
    assert not parts(model)
    assert torch.equal(logits(model), wanted)


def test_a_model_that_changes_its_dtype_is_joined_anew() -> None:
    model = tiny_model("llama")
    wanted = logits(model)
    replace_products(model)
    old = parts(model)[0].forward.whole
    assert follow(model, torch.zeros(1, dtype=torch.float32), True, True)
    assert parts(model)[0].forward.whole is not old
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in model.parameters()}
    assert sum(held.values()) == sum(one.nbytes for one in model.parameters())
    assert logits(model).dtype == torch.float32
    assert 0 < (logits(model) - wanted).abs().max() < 1e-4


def test_a_copy_and_a_model_in_another_dtype_multiply_with_their_own_weights() -> None:
    model = tiny_model("llama", torch.float32)
    join_layers(model)
    wanted = logits(model)
    made = shaken(model, 0.5)
    assert (logits(made) - wanted).abs().max() > 0.1 * wanted.std()
    restore_products(made)
    assert torch.equal(logits(shaken(model, 0.5)), logits(made))
    assert torch.equal(logits(model), wanted)
    assert (logits(model.double()) - wanted).abs().max() < 1e-4
    assert logits(model).dtype == torch.float64


def test_an_int8_copy_multiplies_each_part_by_itself_and_leaves_the_model() -> None:
    model = tiny_model("llama", torch.float32)
    wanted = logits(model)
    join_layers(model)
    made = int8_copy(model)
    assert not parts(made)
    assert sum(isinstance(layer.__dict__.get("forward"), Int8Product) for layer in made.modules()) > 10
    assert 0 < (logits(made) - wanted).abs().max() < 0.2 * wanted.std()
    assert len(parts(model)) == 10
    assert (logits(model) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("change", ["hook", "bias", "dtype", "other layer"])
def test_layers_that_differ_are_not_joined(change: str) -> None:
    model = tiny_model("llama")
    query = model.model.layers[0].self_attn.q_proj
    if change == "hook":
        query.register_forward_hook(lambda module, given, output: output)
    elif change == "bias":
        query.bias = torch.nn.Parameter(torch.zeros(32, dtype=torch.float64))
    elif change == "dtype":
        query.to(torch.float32)
    else:
        model.model.layers[0].self_attn.q_proj = torch.nn.Sequential(query)
    join_layers(model)
    assert len(parts(model)) == 7
    assert not isinstance(query.__dict__.get("forward"), JoinedPart)


def test_other_families_are_not_joined() -> None:
    for kind in ("gemma2", "mixtral", "gpt_neox"):
        model = tiny_model(kind)
        join_layers(model)
        assert not parts(model)
