"""What drafting inside `generate` keeps with a model, for how long, and how it leaves the model."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from generate_pairs import NEW, batch, both, small
from tiny_folders import Folders
from transformers import (
    AutoModelForCausalLM,
    EosTokenCriteria,
    StoppingCriteria,
)

from draftsmith.infer import speculative
from draftsmith.infer.engine import kept


@pytest.fixture(scope="module")
def llama(make_model: Any, shake: Any) -> tuple[Any, Any]:
    model = make_model("llama", torch.float32)
    return model, shake(model, 0.06)


@pytest.fixture
def on_disk(folders: Folders) -> Any:
    return AutoModelForCausalLM.from_pretrained(folders.target)


def test_the_target_is_built_once_and_a_named_draft_is_loaded_once(
    folders: Folders, on_disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = on_disk
    built: list[str] = []
    for name in ("HFTarget", "load_drafter"):
        made = getattr(kept, name)
        monkeypatch.setattr(kept, name, lambda *given, name=name, made=made: (built.append(name), made(*given))[1])
    ids = torch.randint(4, 300, (2, 12))
    named = f"small:{folders.same_size_draft}"
    for drafter in (named, named, "pld", named, "pld"):
        model.generate(ids, max_new_tokens=4, do_sample=False, custom_generate=speculative(drafter))
    assert built == ["HFTarget", "load_drafter", "load_drafter"]
    model.double()
    made = model.generate(ids, max_new_tokens=4, do_sample=False, custom_generate=speculative("pld"))
    assert built[3:] == ["HFTarget", "load_drafter"]
    assert torch.equal(made, model.generate(ids, max_new_tokens=4, do_sample=False))


def test_nothing_keeps_the_model_alive_and_copies_start_without_it(llama: tuple[Any, Any]) -> None:
    model = copy.deepcopy(llama[0])
    call = speculative("pld")
    model.generate(**batch(1), max_new_tokens=4, custom_generate=call)
    held = weakref.ref(vars(model)[kept._ATTRIBUTE]._target)
    assert held() is not None
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert vars(other)[kept._ATTRIBUTE]._target is None
        plain, drafted = both(other, call, **batch(1))
        assert torch.equal(plain, drafted)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert held() is None


def test_rows_leave_the_engine_whatever_happens(llama: tuple[Any, Any]) -> None:
    class Fails(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            if input_ids.shape[1] > 30:
                raise RuntimeError("planted")
            return torch.zeros(len(input_ids), dtype=torch.bool)

    model = copy.deepcopy(llama[0])
    call = speculative(small(llama[1]))
    for criteria in ([], [EosTokenCriteria(20)]):
        given = {**batch(3), "max_new_tokens": NEW, "pad_token_id": 0}
        with pytest.raises(RuntimeError, match="planted"):
            model.generate(**given, stopping_criteria=[*criteria, Fails()], custom_generate=call)
        plain, drafted = both(model, call, **batch(3), eos_token_id=None)
        assert torch.equal(plain, drafted)


def test_training_mode_is_put_back_and_refused_with_dropout(make_model: Any) -> None:
    model = make_model("llama", torch.float32).train()
    model.model.layers[0].eval()
    plain, drafted = both(model, speculative("pld"), **batch(1))
    assert torch.equal(plain, drafted)
    assert model.training
    assert not model.model.layers[0].training
    model = make_model("gpt2", torch.float32).train()
    with pytest.raises(ValueError, match=r"in training mode, with dropout: call model\.eval\(\) first"):
        model.generate(**batch(1), max_new_tokens=4, custom_generate=speculative("pld"))
