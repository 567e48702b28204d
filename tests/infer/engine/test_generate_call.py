"""What a call of `generate` with drafting gives back, and what it is refused for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generate_pairs import batch, both
from transformers import (
    DynamicCache,
)

from draftsmith.infer import speculative


@pytest.fixture(scope="module")
def llama(make_model: Any, shake: Any) -> tuple[Any, Any]:
    model = make_model("llama", torch.float32)
    return model, shake(model, 0.06)


def test_return_dict_holds_the_sequences(llama: tuple[Any, Any]) -> None:
    plain, drafted = both(llama[0], speculative("pld"), **batch(3), eos_token_id=None, return_dict_in_generate=True)
    assert type(plain) is type(drafted)
    assert torch.equal(plain["sequences"], drafted["sequences"])


def filled_cache(model: Any) -> DynamicCache:
    made = DynamicCache(config=model.config)
    model(torch.tensor([[5, 6, 7]]), past_key_values=made)
    return made


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_beams": 3}, "asks for beam search"),
    ({"num_return_sequences": 2, "do_sample": True}, "does not support num_return_sequences: repeat the prompt"),
    ({"use_cache": False}, "leave out use_cache=False"),
    ({"prompt_lookup_num_tokens": 3}, "asks for assisted generation"),
    ({"assistant_model": "itself"}, "asks for assisted generation"),
    ({"guidance_scale": 2.0}, "UnbatchedClassifierFreeGuidanceLogitsProcessor"),
    ({"encoder_repetition_penalty": 1.2}, "EncoderRepetitionPenaltyLogitsProcessor"),
    ({"past_key_values": "filled"}, "leave out past_key_values"),
    ({"token_type_ids": torch.zeros(1, 10, dtype=torch.long)}, "this call gives token_type_ids"),
    ({"position_ids": torch.arange(10)[None] + 1}, "leave out position_ids"),
    ({"synced_gpus": True}, "synced_gpus"),
    ({"max_new_tokens": 600}, "the prompt has 10 tokens and 600 more may follow, but the model has 512 positions"),
    *(({"return_dict_in_generate": True, name: True}, f"does not support {name}") for name in (
        "output_scores", "output_logits", "output_attentions", "output_hidden_states")),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[next(reversed(asked)) for asked, _ in REFUSED])
def test_what_it_cannot_honour_is_refused_in_one_line(make_model: Any, arguments: dict[str, Any], message: str) -> None:
    kind = "gpt2" if "token_type_ids" in arguments else "llama"
    model = make_model(kind, torch.float32)
    made = {"itself": model, "filled": filled_cache(model)}
    given = {name: made[value] if isinstance(value, str) else value for name, value in arguments.items()}
    asked = {**batch(1), "max_new_tokens": 5} | given
    if isinstance(given.get("past_key_values"), DynamicCache):
        asked["attention_mask"] = torch.ones(1, 13)
    with pytest.raises(ValueError, match=message) as raised:
        model.generate(**asked, custom_generate=speculative("pld"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("mask", [[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]])
def test_a_mask_that_hides_more_than_left_padding_is_refused(llama: tuple[Any, Any], mask: list[int]) -> None:
    given = {"inputs": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.tensor([mask]), "max_new_tokens": 4}
    with pytest.raises(ValueError, match="row 0: attention_mask may hide padding on the left only"):
        llama[0].generate(**given, custom_generate=speculative("pld"))


def test_a_wrong_drafter_is_refused_when_it_is_named() -> None:
    with pytest.raises(ValueError, match="unknown drafter 'pdl'; known are pld"):
        speculative("pdl")
    with pytest.raises(ValueError, match="'pld,pld' names 2 drafters where one is wanted"):
        speculative("pld,pld")
