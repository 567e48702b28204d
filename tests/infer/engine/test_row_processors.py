"""Logits processors of `generate`, row by row: the same text as in its batch, or one clear line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generate_pairs import batch, both, small
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
)

from draftsmith.infer import speculative


@pytest.fixture(scope="module")
def llama(make_model: Any, shake: Any) -> tuple[Any, Any]:
    model = make_model("llama", torch.float32)
    return model, shake(model, 0.06)


class Favours(LogitsProcessor):
    """Prefers the token after the newest one."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[torch.arange(len(scores)), (input_ids[:, -1] + 1) % scores.shape[1]] += 3.0  # in place, as many do
        return scores


class Counts(LogitsProcessor):
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return scores + self.calls * torch.arange(scores.shape[1])


class OfTheBatch(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + torch.zeros(3, 1)


def allowed(row: int, ids: torch.Tensor) -> list[int]:
    return [token for token in range(3, 61) if token % 3 != row]


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 3},
        {"min_length": 40, "eos_token_id": list(range(3, 30))},
        {"sequence_bias": [[[5], 4.0], [[6, 7], 2.0]]},
        {"forced_eos_token_id": 5, "eos_token_id": 5},
        {"exponential_decay_length_penalty": (4, 1.5), "eos_token_id": 5},
        {"begin_suppress_tokens": list(range(3, 50))},
        {"renormalize_logits": True},
        {"prefix_allowed_tokens_fn": allowed},
        {"logits_processor": LogitsProcessorList([Favours()])},
        {"logits_processor": LogitsProcessorList([Favours()]), "repetition_penalty": 1.2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_every_processor_sees_rows_as_generate_shows_them(llama: tuple[Any, Any], settings: dict[str, Any]) -> None:
    call = speculative(small(llama[1]))
    given = {"eos_token_id": None, **batch(3), **settings}
    plain, drafted = both(llama[0], call, **given)
    assert torch.equal(plain, drafted)
    free, _ = both(llama[0], call, **batch(3), eos_token_id=None)
    if "renormalize_logits" not in settings:
        assert plain.shape != free.shape or not torch.equal(plain, free)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (Counts(), "the logits processor Counts changes from call to call"),
        (OfTheBatch(), r"OfTheBatch gives \[3, 61\] for one row, not \[1, 61\]"),
    ],
)
def test_a_processor_that_is_no_function_of_one_row_is_refused(
    llama: tuple[Any, Any], processor: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        llama[0].generate(
            **batch(3), max_new_tokens=5, logits_processor=LogitsProcessorList([processor]),
            custom_generate=speculative("pld"),
        )  # fmt: skip
