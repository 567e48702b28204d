"""After any sequence of drafts and verdicts the next logits equal those of a fresh pass, and the context lies in memory
once."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planted import plant

from draftsmith.infer.models import pass_timer
from draftsmith.infer.models.architectures import prepare
from draftsmith.infer.models.pass_timer import measured_buckets
from draftsmith.infer.models.runner import masks, model_runner
from draftsmith.infer.models.runner.entries import Entries
from draftsmith.infer.models.runner.masks import MaskPlan
from draftsmith.infer.models.runner.model_runner import ModelRunner

VOCAB = 61
KINDS = ["llama", "gemma3", "gpt2"]


@pytest.fixture(scope="module")
def models(make_model: Any) -> dict[str, Any]:
    return {kind: make_model(kind) for kind in KINDS}


def fresh_logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0, -1]


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """Tokens and parents of a random tree, and a path in it that a verdict keeps."""
    size = draw(st.integers(1, 9))
    tokens = draw(st.lists(st.integers(0, VOCAB - 1), min_size=size, max_size=size))
    parents = [-1] + [draw(st.integers(0, i - 1)) for i in range(1, size)]
    at = draw(st.integers(0, size - 1))
    path: list[int] = []
    while at >= 0:
        path.append(at)
        at = parents[at]
    return tokens, parents, path[::-1]


def chains(rows: list[Any], token: int) -> list[Entries]:
    return [Entries.chain([token]) for _ in rows]


@pytest.fixture(params=[masks.AT_ONCE, 0], ids=["one call", "merged parts"])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Short contexts take one masked call; with 0, context and tree are always merged."""
    monkeypatch.setattr(masks, "AT_ONCE", request.param)
    return int(request.param)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS),
    dense=st.booleans(),
    prompts=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    steps=st.lists(st.lists(trees(), min_size=3, max_size=3), min_size=1, max_size=4),
    leaver=st.integers(0, 2),
)
def test_next_logits_equal_a_fresh_pass_after_any_drafts_and_verdicts(
    at_once: int,
    models: dict[str, Any],
    kind: str,
    dense: bool,
    prompts: list[int],
    steps: list[Any],
    leaver: int,
) -> None:
    model = models[kind]
    plan = prepare(model)
    assert plan.packed
    lm = ModelRunner(model, replace(plan, packed=not dense))
    texts: dict[int, list[int]] = {}
    for row, length in enumerate(prompts):
        texts[row] = [(5 * i + 11 * row) % VOCAB for i in range(length)]
        lm.open(row)
    lm.prefill(list(texts), list(texts.values()))
    for number, trees_ in enumerate(steps):
        if number == 2 and 0 in texts:  # from now on the first tokens are held once for two rows
            length = max(1, len(texts[0]) // 2)
            lm.fork(0, 9, length)
            texts[9] = texts[0][:length]
        rows = list(texts)
        drafted = {row: trees_[row % 3] for row in rows}
        lm.forward(rows, [Entries(drafted[row][0], drafted[row][1]) for row in rows])
        for row in rows:
            texts[row] += [drafted[row][0][node] for node in drafted[row][2]]
        lm.commit(rows, [drafted[row][2] for row in rows])
        if number == 1 and leaver in texts and len(texts) > 1:
            lm.close(leaver)
            del texts[leaver]
    rows = list(texts)
    found = lm.forward(rows, chains(rows, 7)).logits_NV
    for row, logits_V in zip(rows, found, strict=True):
        assert lm.length(row) == len(texts[row])
        torch.testing.assert_close(logits_V, fresh_logits(model, [*texts[row], 7]), rtol=0, atol=1e-9)


def test_entries_of_later_passes_see_their_uncommitted_ancestors(models: dict[str, Any], at_once: int) -> None:
    model = models["llama"]
    lm = ModelRunner(model, prepare(model))
    lm.open("a", 20)
    lm.open("b", 20)
    lm.prefill(["a", "b"], [[3, 4, 5], [9, 8]])
    lm.forward(["a", "b"], [Entries([10, 11], [-1, -1]), Entries([12], [-1])])
    logits_NV = lm.forward(["a"], [Entries([20, 21, 22], [0, 1, 3])]).logits_NV
    torch.testing.assert_close(logits_NV[0], fresh_logits(model, [3, 4, 5, 10, 20]), rtol=0, atol=1e-9)
    torch.testing.assert_close(logits_NV[2], fresh_logits(model, [3, 4, 5, 11, 21, 22]), rtol=0, atol=1e-9)
    lm.commit(["a", "b"], [[1, 3, 4], [0]])
    logits_NV = lm.forward(["b", "a"], [Entries.chain([30]), Entries.chain([31])]).logits_NV
    torch.testing.assert_close(logits_NV[0], fresh_logits(model, [9, 8, 12, 30]), rtol=0, atol=1e-9)
    torch.testing.assert_close(logits_NV[1], fresh_logits(model, [3, 4, 5, 11, 21, 22, 31]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dense", [False, True])
def test_padding_gives_no_nan_and_disturbs_nothing(models: dict[str, Any], dense: bool) -> None:
    model = models["gemma3"]
    lm = ModelRunner(model, replace(prepare(model), packed=not dense), buckets=(8,))
    lm.open(0)
    lm.open(1)
    lm.prefill([0, 1], [list(range(3, 30)), [5]])
    seen: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda m, a, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    output = lm.forward([0, 1], [Entries.chain([1, 2, 3]), Entries.chain([4])], ["last"])
    hook.remove()
    assert seen == [8]
    assert output.logits_NV.shape[0] == output.taps["last"].shape[0] == 4
    torch.testing.assert_close(output.logits_NV[3], fresh_logits(model, [5, 4]), rtol=0, atol=1e-9)
    lm.commit([0, 1], [[0, 1, 2], [0]])
    for row, text in ((0, [*range(3, 30), 1, 2, 3, 9]), (1, [5, 4, 9])):
        found = lm.forward([row], chains([row], 9)).logits_NV[0]
        torch.testing.assert_close(found, fresh_logits(model, text), rtol=0, atol=1e-9)


def test_only_the_wanted_logits_come_back(models: dict[str, Any]) -> None:
    model = models["llama"]
    lm = ModelRunner(model, prepare(model))
    for row in "ab":
        lm.open(row)
    every = lm.forward("ab", [Entries.chain([3, 4, 5]), Entries.chain([6, 7])]).logits_NV
    lm.drop("ab")
    some = lm.forward("ab", [Entries.chain([3, 4, 5]), Entries.chain([6, 7])], wanted=[2, 1]).logits_NV
    torch.testing.assert_close(some, every[[1, 2, 4]], rtol=0, atol=1e-9)
    lm.drop("ab")
    assert lm.forward("ab", [Entries.chain([3, 4, 5]), Entries.chain([6, 7])], wanted=[0, 0]).logits_NV.shape[0] == 0


def test_states_stand_for_the_embeddings_of_tokens(models: dict[str, Any]) -> None:
    model = models["llama"]
    lm = ModelRunner(model, prepare(model), buckets=(8,))
    lm.open("a")
    lm.prefill(["a"], [[3, 4, 5]])
    wanted = lm.forward(["a"], [Entries([6, 7], [-1, -1])]).logits_NV
    lm.drop(["a"])
    states = model.get_input_embeddings()(torch.tensor([6, 7]))
    found = lm.forward(["a"], [Entries([6, 7], [-1, -1], states)]).logits_NV
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_after_a_pass_that_failed_a_row_goes_on(models: dict[str, Any]) -> None:
    model = models["llama"]
    lm = ModelRunner(model, prepare(model))
    lm.open("a")
    lm.prefill(["a"], [[3, 4, 5]])

    def fail(*given: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        lm.forward(["a"], [Entries([9, 10], [-1, -1])])
    hook.remove()
    assert model.config._attn_implementation == "sdpa"
    lm.drop(["a"])
    found = lm.forward(["a"], chains(["a"], 9)).logits_NV[0]
    torch.testing.assert_close(found, fresh_logits(model, [3, 4, 5, 9]), rtol=0, atol=1e-9)


def check_chunks(model: Any, plan: MaskPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill in chunks of 7 leaves the next logits and the hidden states of a fresh pass."""
    monkeypatch.setattr(model_runner, "PREFILL_CHUNK", 7)
    lm = ModelRunner(model, plan)
    texts = {row: [(5 * i + 11 * row) % VOCAB for i in range(length)] for row, length in enumerate((30, 3, 14, 15))}
    for row, text in texts.items():
        lm.open(row, len(text) + 2)
    layers = model.config.num_hidden_layers
    names = [*(f"layer:{k}" for k in range(layers)), "last"]
    states = lm.prefill(list(texts), list(texts.values()), names)
    found = lm.forward(list(texts), chains(list(texts), 7)).logits_NV
    for row, text in texts.items():
        assert lm.length(row) == len(text)
        torch.testing.assert_close(found[row], fresh_logits(model, [*text, 7]), rtol=0, atol=1e-9)
        with torch.inference_mode():
            wanted = model(torch.tensor([text]), output_hidden_states=True, use_cache=False).hidden_states
        assert len(wanted) == len(names)
        for name, one in zip(names, wanted):
            torch.testing.assert_close(states[row][name], one[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefill_in_chunks_leaves_what_one_pass_leaves(
    models: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_chunks(models[kind], prepare(models[kind]), monkeypatch)


@pytest.mark.parametrize(
    ("sound", "fault"),
    [
        ("tokens[i][offset : offset", "tokens[i][offset + (offset > 0) : offset"),
        ("tokens[i][offset : offset", "(tokens[i][:7] + tokens[i][8:] + [0])[offset : offset"),
        ("offset += size", "offset += size + 1"),
        ("states[i][name].append(own)", "states[i][name].append(own.flip(0))"),
    ],
)
def test_planted_chunk_that_skips_a_token_is_caught(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch, sound: str, fault: str
) -> None:
    plan = prepare(models["llama"])
    plant(monkeypatch, ModelRunner, "prefill", sound, fault)
    with pytest.raises(AssertionError):
        check_chunks(models["llama"], plan, monkeypatch)


def test_the_state_before_the_final_norm_is_a_tap_too(models: dict[str, Any]) -> None:
    model = models["llama"]
    lm = ModelRunner(model, prepare(model))
    lm.open("a")
    output = lm.forward(["a"], [Entries.chain([3, 4])], ["layer:2", "last"])
    torch.testing.assert_close(model.model.norm(output.taps["layer:2"]), output.taps["last"])
    for name in ("layer:3", "layer:-1", "first"):
        with pytest.raises(ValueError, match=r"use 'last', or 'layer:k'.*up to layer:2"):
            lm.taps.check(name)


@pytest.mark.parametrize(
    ("slow", "buckets"),
    [
        ({1: 0.02, 2: 0.02, 3: 0.0, 4: 0.005, 8: 0.03}, (3,)),
        ({1: 0.0, 2: 0.02, 3: 0.02, 4: 0.005, 8: 0.03}, (1, 4)),  # one token is not padded to four
        ({1: 0.0, 2: 0.005, 3: 0.01, 4: 0.015, 8: 0.03}, ()),
    ],
)
def test_buckets_are_what_the_model_runs_faster(
    make_model: Any, monkeypatch: pytest.MonkeyPatch, slow: dict[int, float], buckets: tuple[int, ...]
) -> None:
    model = make_model("llama")
    plan = prepare(model)
    assert measured_buckets(model, plan) == (), "a tiny model is not timed"
    monkeypatch.setattr(pass_timer, "SMALL", 0)
    hook = model.register_forward_pre_hook(lambda m, a, g: time.sleep(slow[g["input_ids"].shape[1]]), with_kwargs=True)
    assert measured_buckets(model, plan) == buckets
    hook.remove()
