"""Stops, settings, keyed randomness and distributions of a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planted import plant
from transformers import AutoTokenizer, GenerationConfig

from draftsmith.infer.contract.distribution import NodeDistribution
from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.rng import uniform
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings, resolve_settings


class Letters:
    """Token 0 is 'a', 1 'b', and so on; 30 is two letters at once."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join("xy" if token == 30 else chr(97 + token) for token in ids)


def row(**stops: Any) -> Row:
    return Row("r", [0, 1], Settings(), Stops(**stops), Letters())  # type: ignore[arg-type]


def test_a_prompt_can_be_asked_again_because_a_row_keeps_its_own_copy() -> None:
    prompt = [1, 2]
    row = Row("a", prompt)
    row.ids.append(3)
    assert (prompt, row.ids, row.new_ids) == ([1, 2], [1, 2, 3], [3])


def test_tokens_are_cut_at_the_first_reason_to_stop() -> None:
    assert row(max_new_tokens=3).cut([5, 6, 7, 8]) == ([5, 6, 7], "max_new_tokens")
    assert row(ids=frozenset([6, 9])).cut([5, 6, 9]) == ([5, 6], "eos")
    assert row().cut([5, 6]) == ([5, 6], "")


def test_a_stop_string_may_lie_across_tokens_and_across_steps() -> None:
    one = row(strings=("fgh",))
    assert one.cut([5, 6, 7, 8]) == ([5, 6, 7], "stop string 'fgh'")
    one.ids += [4, 5, 6]
    assert one.cut([7, 8]) == ([7], "stop string 'fgh'")
    assert row(strings=("yc",)).cut([30, 2, 3]) == ([30, 2], "stop string 'yc'")


def check_stop_strings() -> None:
    """However the tokens fall into steps, the row stops at the token that completes the string."""
    tokens = [2, 30, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    for text in ("f", "efgh", "defghij", "cxydefghijk", "ydefghi"):
        wanted = next(n for n in range(len(tokens)) if text in Letters().decode(tokens[: n + 1])) + 1
        for size in range(1, len(tokens) + 1):
            one, stop = row(strings=("never", text)), ""
            for start in range(0, len(tokens), size):
                kept, stop = one.cut(tokens[start : start + size])
                one.ids += kept
                if stop:
                    break
            assert (one.new_ids, stop) == (tokens[:wanted], f"stop string {text!r}")


def test_a_stop_string_may_lie_across_any_number_of_tokens_and_steps() -> None:
    check_stop_strings()


@pytest.mark.parametrize(
    ("sound", "fault"),
    [
        ("min(new, longest + 4)", "min(new, 1)"),
        ("min(new, longest + 4)", "min(new, 2)"),
        ("decode(tail + kept,", "decode(kept,"),
        ("decode(tail + kept,", "decode((tail + kept)[-2:],"),
    ],
)
def test_planted_stop_string_over_too_few_tokens_is_caught(
    monkeypatch: pytest.MonkeyPatch, sound: str, fault: str
) -> None:
    plant(monkeypatch, Row, "_stop_string", sound, fault)
    with pytest.raises(AssertionError):
        check_stop_strings()


def test_a_stop_string_of_letters_that_take_several_tokens_each_is_found(word_tokenizer: Any) -> None:
    """Each of these letters is four tokens long, one byte each."""
    tokenizer = AutoTokenizer.from_pretrained(word_tokenizer)
    ids = tokenizer("a \U0001f600\U0001f680\U0001f600 b")["input_ids"]
    one = Row("r", [5], Settings(), Stops(strings=("\U0001f680\U0001f600",)), tokenizer)
    for token in ids:
        kept, stop = one.cut([token])
        one.ids += kept
        if stop:
            break
    assert len(one.new_ids) == 2 + 3 * 4
    assert tokenizer.decode(one.new_ids) == "a \U0001f600\U0001f680\U0001f600"


def test_a_stop_string_in_the_prompt_stops_nothing() -> None:
    assert row(strings=("ab",)).cut([2, 3]) == ([2, 3], "")
    assert row(strings=("bc",)).cut([2, 3]) == ([2, 3], "")


@pytest.mark.parametrize("bad", [{"max_new_tokens": 0}, {"strings": ("",)}])
def test_stops_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Stops(**bad)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt 7 is empty"):
        Row("7", [])


def test_settings_come_from_the_config_and_are_overridden_by_what_is_asked() -> None:
    config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.1)
    found = resolve_settings(config, top_p=0.8, seed=3)
    assert (found.temperature, found.top_p, found.repetition_penalty, found.seed) == (0.6, 0.8, 1.1, 3)
    assert resolve_settings(config, temperature=0.0).greedy
    assert resolve_settings(GenerationConfig(temperature=0.6)).greedy


def test_top_k_that_nobody_asked_for_is_off_here_and_told_to_the_baseline() -> None:
    found = resolve_settings(GenerationConfig(do_sample=True))
    assert found.top_k == 0
    assert found.generation_kwargs()["top_k"] == 0


@pytest.mark.parametrize(
    "config",
    [GenerationConfig(num_beams=4), GenerationConfig(guidance_scale=2.0), GenerationConfig(forced_eos_token_id=2)],
)
def test_what_a_tree_walk_cannot_honour_is_refused(config: GenerationConfig) -> None:
    with pytest.raises(ValueError, match="lossless drafting does not support"):
        resolve_settings(config)


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -2}, {"min_p": 2.0}, {"warmth": 1}])
def test_settings_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        resolve_settings(None, **bad)


def test_distributions_equal_transformers_own_processors_in_their_own_order(make_model: Any) -> None:
    """Whatever `generate` would sample from after the same prefix and path."""
    model = make_model("llama", torch.float32)
    settings = Settings(0.7, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2, no_repeat_ngram_size=2)
    ids = [3, 4, 5, 3]
    out = model.generate(
        torch.tensor([ids]), max_new_tokens=1, output_scores=True, return_dict_in_generate=True, eos_token_id=None,
        **settings.generation_kwargs(),
    )  # fmt: skip
    wanted_V = torch.softmax(out.scores[0][0].double(), -1)
    draft = Draft().chain([5, 3], "t")
    with torch.inference_mode():
        logits_V = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    distribution = NodeDistribution(
        torch.stack([torch.zeros_like(logits_V)] * 2 + [logits_V]), Row("r", ids[:2], settings), draft, None
    )
    torch.testing.assert_close(distribution.probs(1), wanted_V, rtol=0, atol=1e-6)
    assert distribution.probs(1)[4] == 0, "3 4 stood in the prefix: the path's 3 may not be followed by 4"


def test_nan_logits_are_one_clear_line() -> None:
    distribution = NodeDistribution(torch.full((1, 5), float("nan")), Row("r", [1, 2], Settings(1.0)), Draft(), None)
    with pytest.raises(ValueError, match="logits are NaN"):
        distribution.probs(ROOT)


def test_a_uniform_depends_on_all_of_its_key_and_on_nothing_else() -> None:
    keys = [
        (s, r, p, w, i) for s in (0, 1) for r in ("a", "b") for p in (0, 1) for w in ("draw", "draft") for i in (0, 1)
    ]
    values = [uniform(*key) for key in keys]
    assert len(set(values)) == len(keys)
    assert values == [uniform(*key) for key in keys]
    many = torch.tensor([uniform(7, "row", i, "draw") for i in range(4000)])
    assert abs(float(many.mean()) - 0.5) < 0.02
    assert 0 <= float(many.min())
    assert float(many.max()) < 1
