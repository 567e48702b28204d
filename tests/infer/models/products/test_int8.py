"""int8 drafts: close to the model they copy, which is left alone; chosen by measurement, on a CPU only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folders import tiny_llama

from draftsmith.infer.drafters import SD2, SmallLM
from draftsmith.infer.models.architectures import prepare
from draftsmith.infer.models.layers import weight_bytes
from draftsmith.infer.models.products import int8 as int8_module
from draftsmith.infer.models.products.int8 import Int8Product, chosen, int8_copy, quantized


def is_int8(model: Any) -> bool:
    return any(isinstance(layer.__dict__.get("forward"), Int8Product) for layer in model.modules())


@pytest.mark.parametrize("shape", [(32, 1), (32, 61), (64, 7), (512, 2048), (96, 32)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 16, 65])
def test_a_product_is_that_of_the_rounded_weights(shape: tuple[int, int], tokens: int) -> None:
    torch.manual_seed(tokens)
    layer = torch.nn.Linear(*shape)
    weight_OI, scale_O = quantized(layer.weight)
    assert weight_OI.shape[0] % 32 == 0
    x = torch.randn(2, tokens, shape[0])
    ours = Int8Product(weight_OI, scale_O, layer)(x)
    rounded_OI = (weight_OI.float() * scale_O.float()[:, None])[: shape[1]]
    assert (rounded_OI - layer.weight).abs().max() < 0.01 * layer.weight.abs().max()
    wanted = torch.nn.functional.linear(x.bfloat16().float(), rounded_OI, layer.bias)
    assert ours.shape == wanted.shape
    assert (ours - wanted).abs().max() < 0.01 * wanted.abs().max()


def test_an_output_without_weights_stays_zero() -> None:
    layer = torch.nn.Linear(32, 32, bias=False)
    layer.weight.data[3] = 0.0
    ours = Int8Product(*quantized(layer.weight), layer)(torch.randn(4, 32))
    assert ours[:, 3].eq(0).all()
    assert ours.isfinite().all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral"])
def test_a_copy_has_close_logits_and_leaves_its_model_alone(make_model: Any, name: str) -> None:
    model = make_model(name).float()
    ids = torch.tensor([[5, 9, 12, 7, 30]])
    with torch.inference_mode():
        before = model(ids).logits
        made = int8_copy(model)
        close = made(ids).logits
        after = model(ids).logits
    assert torch.equal(before, after)
    assert not is_int8(model)
    assert is_int8(made)
    assert 0 < (close - before).std() < 0.1 * before.std()
    assert made.get_input_embeddings().weight is model.get_input_embeddings().weight


def test_a_pass_reads_fewer_bytes() -> None:
    model = tiny_llama(hidden_size=64, intermediate_size=96)
    saved = weight_bytes(model) - weight_bytes(int8_copy(model))
    linear = sum(m.weight.numel() for m in model.modules() if type(m) is torch.nn.Linear)
    assert 0.7 * 4 * linear < saved < 0.75 * 4 * linear


@pytest.mark.parametrize(("faster", "wanted"), [(True, True), (False, False)])
def test_auto_takes_what_was_measured_to_be_faster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, faster: bool, wanted: bool
) -> None:
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path))
    model = tiny_llama()
    asked = []
    monkeypatch.setattr(int8_module, "is_faster", lambda one, other, plan, width: asked.append(width) or faster)
    assert not is_int8(chosen(model, prepare(model), "auto", 3)), "a small model is not worth timing"
    assert not asked
    monkeypatch.setattr(int8_module, "SMALL", 1)
    assert is_int8(chosen(model, prepare(model), "auto", 3)) is wanted
    assert asked == [3]
    assert not is_int8(chosen(model.double(), prepare(model), "auto", 3)), "float64 was asked for to be exact"


def test_the_choice_is_timed_once_for_a_machine_and_shapes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second load must not choose otherwise: another choice is other drafts."""
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(int8_module, "SMALL", 1)
    outcomes = iter([True, False, False, True, False, True])
    monkeypatch.setattr(int8_module, "is_faster", lambda *given: next(outcomes))

    def load(width: int = 3, dtype: torch.dtype = torch.float32, **shape: int) -> bool:
        model = tiny_llama(**shape).to(dtype)
        return is_int8(chosen(model, prepare(model), "auto", width))

    assert [load(), load(), load()] == [True] * 3
    assert [load(width=4), load(width=4)] == [False] * 2
    assert [load(num_hidden_layers=3), load(num_hidden_layers=3), load()] == [False, False, True]
    assert [load(dtype=torch.bfloat16), load(dtype=torch.bfloat16)] == [True] * 2
    for path in (tmp_path / "cache" / "int8").rglob("*.json"):
        path.write_text("{broken")
    assert [load(), load()] == [False] * 2, "what cannot be read is timed again"
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("no folder")
    assert load(), "what cannot be kept is used all the same"
    assert next(outcomes, None) is None


def test_a_faster_model_is_found_by_its_passes() -> None:
    small, large = tiny_llama(), tiny_llama(num_hidden_layers=12)
    plan = prepare(small)
    prepare(large)
    assert int8_module.is_faster(small, large, plan, 2)
    assert not int8_module.is_faster(large, small, plan, 2)


def test_a_model_given_as_an_object_is_never_timed_and_true_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_module, "SMALL", 1)
    monkeypatch.setattr(int8_module, "is_faster", lambda *given: True)
    model = tiny_llama()
    assert not is_int8(SmallLM(model).reader.lm.model)
    assert is_int8(SmallLM(model, int8=True).reader.lm.model)
    assert is_int8(SD2(model, [1, 2], int8=True).reader.lm.model)
    assert not is_int8(model)


@pytest.mark.parametrize("make", [SmallLM, lambda model, **more: SD2(model, [1, 2], **more)])
def test_another_value_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="int8 is auto, true or false, not 'yes'"):
        make(tiny_llama(), int8="yes")


def test_a_model_whose_inputs_the_product_cannot_take_is_refused() -> None:
    model = tiny_llama(hidden_size=24, intermediate_size=40, num_attention_heads=2, num_key_value_heads=2)
    with pytest.raises(ValueError, match="no linear layer whose inputs divide by 32"):
        SmallLM(model, int8=True)
