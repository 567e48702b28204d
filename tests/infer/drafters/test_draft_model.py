"""A draft that is loaded by name runs in its target's dtype, and the text stays plain decoding's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoded import assert_tried_hard

from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.drafters import SD2, SmallLM
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.models.hf_target import HFTarget


@pytest.fixture(scope="module")
def folder(make_model: Any, shake: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A trained draft, as training leaves it: float32."""
    path = tmp_path_factory.mktemp("draft")
    shake(make_model("llama", torch.float32), 0.06).save_pretrained(path)
    return str(path)


@pytest.fixture
def load_without_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("draftsmith.infer.models.load.load_tokenizer", lambda name: None)


MAKE = {
    "small": lambda folder, **options: SmallLM(folder, min_confidence=0.0, **options),
    "sd2": lambda folder, **options: SD2(
        folder, [1, 2], "threshold", thresholds=[0.5, 0], min_confidence=0.0, **options
    ),
}


@pytest.mark.usefixtures("load_without_tokenizer")
@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_draft_takes_its_target_s_dtype_and_the_text_is_the_same(
    make_model: Any, folder: str, name: str, dtype: torch.dtype
) -> None:
    target = HFTarget(make_model("llama", dtype))

    def rows() -> list[Row]:
        return [Row(str(i), [5 + i, 9, 3 + 2 * i, 7], stops=Stops(24)) for i in range(4)]

    plain = [one.token_ids for one in generate(target, Empty(), rows())]
    drafter = MAKE[name](folder)
    before = drafter.reader.lm
    drafter.bind(target)
    assert drafter.reader.lm is not before
    assert {parameter.dtype for parameter in drafter.model.parameters()} == {drafter.reader.lm.dtype} == {dtype}
    made = generate(target, drafter, rows(), batch_size=1)
    if dtype == torch.float64:  # in bfloat16 a tiny random model has ties, which rounding breaks either way
        assert [one.token_ids for one in made] == plain
    assert_tried_hard(made)


@pytest.mark.usefixtures("load_without_tokenizer")
def test_a_dtype_that_was_asked_for_stays(make_model: Any, folder: str) -> None:
    drafter = SmallLM(folder, dtype="float32")
    drafter.bind(HFTarget(make_model("llama", torch.bfloat16)))
    assert drafter.reader.lm.dtype == torch.float32


def test_a_model_that_was_handed_over_stays_as_it_is(make_model: Any, shake: Any) -> None:
    drafter = SmallLM(shake(make_model("llama", torch.float32), 0.06))
    drafter.bind(HFTarget(make_model("llama", torch.bfloat16)))
    assert drafter.reader.lm.dtype == torch.float32


@pytest.mark.usefixtures("load_without_tokenizer")
def test_a_draft_that_goes_back_to_float32_uses_its_own_weights_again(make_model: Any, folder: str) -> None:
    """In bfloat16 its weights may be packed; a packed copy would not follow them."""
    drafter = SmallLM(folder)
    for dtype in (torch.bfloat16, torch.float32):
        drafter.bind(HFTarget(make_model("llama", dtype)))
    ids_1T = torch.tensor([[3, 4, 5]])
    assert drafter.model(ids_1T).logits.dtype == torch.float32
    drafter.model.lm_head.weight.data.zero_()
    assert not drafter.model(ids_1T).logits.any()
