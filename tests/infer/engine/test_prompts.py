"""Prompts of every form, with the fields of GenerationConfig, give the tokens that `model.generate` gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_folders import Folders

from draftsmith.infer.contract.row import Row
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.engine.prompts import as_prompts, rows_of
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.load import load_target
from draftsmith.infer.models.recorded_target import RecordedTarget
from draftsmith.retrieval import PromptLookup

TEXTS = ["the cat and the dog and the", "one two one two one"]


@pytest.fixture(scope="module")
def target(folders: Folders) -> HFTarget:
    return load_target(str(folders.target), dtype="float32", device="cpu")


def theirs(target: HFTarget, ids: list[int], **kwargs: Any) -> list[int]:
    out_1T = target.model.generate(torch.tensor([ids]), **kwargs)
    return [int(token) for token in out_1T[0, len(ids) :]]


def test_texts_conversations_and_ids_are_the_same_prompt(target: HFTarget) -> None:
    engine = Engine(target, PromptLookup(), batch_size=2)
    done = engine.generate(TEXTS, max_new_tokens=12, temperature=0)
    talks = [[{"role": "user", "content": text}] for text in TEXTS]
    rows = rows_of(target, as_prompts(TEXTS))
    ids = [row.ids for row in rows]
    for same in (
        engine.generate(talks, max_new_tokens=12, do_sample=False),
        engine.generate(ids, max_new_tokens=12, temperature=0.0),
    ):
        assert [one.token_ids for one in same] == [one.token_ids for one in done]
    assert [one.text for one in engine.generate(TEXTS[0], max_new_tokens=12, temperature=0)] == [done[0].text]
    assert engine.generate(talks[1], max_new_tokens=12, temperature=0)[0].token_ids == done[1].token_ids
    assert list(engine.stream(TEXTS[0], max_new_tokens=12, temperature=0)) == done[0].token_ids
    assert [theirs(target, some, max_new_tokens=12, do_sample=False) for some in ids] == [one.token_ids for one in done]


def test_fields_change_the_text_as_in_generate(target: HFTarget) -> None:
    engine = Engine(target)
    (ids,) = [row.ids for row in rows_of(target, as_prompts(TEXTS[0]))]
    whole = engine.generate(ids, max_new_tokens=16, temperature=0)[0].token_ids
    for fields in (
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"eos_token_id": whole[4]},
        {"suppress_tokens": [whole[0]]},
    ):
        found = engine.generate(ids, max_new_tokens=16, do_sample=False, **fields)[0].token_ids
        assert found == theirs(target, ids, max_new_tokens=16, do_sample=False, **fields)
        assert found != whole
    hot = [engine.generate(ids, max_new_tokens=16, temperature=1.5, seed=seed)[0].token_ids for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    assert engine.generate(ids, max_new_tokens=16, temperature=1.5, do_sample=False)[0].token_ids == whole


def test_a_system_message_is_for_prompts_without_one(target: HFTarget) -> None:
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "hello"}]
    bare, given, kept = (
        rows_of(target, [("0", prompt)], system=system)[0].ids
        for prompt, system in (("hello", ""), ("hello", "mine"), (own, "yours"))
    )
    assert given == kept != bare


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_beams": 4}, "num_beams=4: lossless drafting does not support it"),
        ({"temprature": 0.5}, "temprature is not a field that changes decoding here; known are bad_words_ids"),
        ({"max_length": 9}, "max_length is not a field"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1"),
        ({"template": "nosuch"}, "nosuch"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_refused_by_name(
    target: HFTarget, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(target).generate("hello", **fields)


def test_a_prompt_that_does_not_fit_fails_alone(target: HFTarget) -> None:
    done = Engine(target, batch_size=2).generate(["hello", "too long " * 400, "hello"], max_new_tokens=4, temperature=0)
    assert [one.stop == "error" for one in done] == [False, True, False]
    assert "the target's context ends at" in done[1].error
    assert done[0].token_ids == done[2].token_ids


def test_recorded_answers_and_bare_models_take_no_texts(make_model: Any) -> None:
    with pytest.raises(ValueError, match="recorded answers: prompts need a model"):
        Engine(RecordedTarget({}, 20)).generate("hello")
    bare = Engine(HFTarget(make_model("llama")))
    with pytest.raises(ValueError, match="has no tokenizer: give prompts as token ids"):
        bare.generate("hello")
    assert (
        bare.generate([3, 4], max_new_tokens=3, temperature=0)[0].token_ids
        == bare.run([Row("0", [3, 4])])[0].token_ids[:3]
    )
