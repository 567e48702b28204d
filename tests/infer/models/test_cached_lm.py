"""After any sequence of drafts and verdicts the next logits equal those of a fresh pass, and the context lies in memory
once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planted import plant

from draftsmith.infer.models import cached_lm
from draftsmith.infer.models.architectures import prepare
from draftsmith.infer.models.cached_lm import CachedLM, Entries, TreeCache, liked_buckets
from draftsmith.infer.models.masks import MaskPlan

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


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS),
    prompts=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    steps=st.lists(st.lists(trees(), min_size=3, max_size=3), min_size=1, max_size=4),
    leaver=st.integers(0, 2),
)
def test_next_logits_equal_a_fresh_pass_after_any_drafts_and_verdicts(
    models: dict[str, Any], kind: str, prompts: list[int], steps: list[Any], leaver: int
) -> None:
    model = models[kind]
    lm = CachedLM(model, prepare(model))
    texts: dict[int, list[int]] = {}
    for row, length in enumerate(prompts):
        texts[row] = [(5 * i + 11 * row) % VOCAB for i in range(length)]
        lm.open(row, length + 2)
    lm.prefill(list(texts), list(texts.values()))
    for number, drafted in enumerate(steps):
        rows = list(texts)
        lm.forward(rows, [Entries(drafted[row][0], drafted[row][1]) for row in rows])
        for row in rows:
            tokens, _, path = drafted[row]
            lm.commit(row, path)
            texts[row] += [tokens[node] for node in path]
        if number == 1 and leaver in texts and len(texts) > 1:
            lm.close(leaver)
            del texts[leaver]
    rows = list(texts)
    logits_BQV, _ = lm.forward(rows, [Entries.chain([7]) for _ in rows])
    for b, row in enumerate(rows):
        assert lm.length(row) == len(texts[row])
        torch.testing.assert_close(logits_BQV[b, 0], fresh_logits(model, [*texts[row], 7]), rtol=0, atol=1e-9)


def test_entries_of_later_passes_see_their_uncommitted_ancestors(models: dict[str, Any]) -> None:
    model = models["llama"]
    lm = CachedLM(model, prepare(model))
    lm.open("a", 20)
    lm.open("b", 20)
    lm.prefill(["a", "b"], [[3, 4, 5], [9, 8]])
    lm.forward(["a", "b"], [Entries([10, 11], [-1, -1]), Entries([12], [-1])])
    logits_BQV, _ = lm.forward(["a"], [Entries([20, 21, 22], [0, 1, 3])])
    torch.testing.assert_close(logits_BQV[0, 0], fresh_logits(model, [3, 4, 5, 10, 20]), rtol=0, atol=1e-9)
    torch.testing.assert_close(logits_BQV[0, 2], fresh_logits(model, [3, 4, 5, 11, 21, 22]), rtol=0, atol=1e-9)
    lm.commit("a", [1, 3, 4])
    lm.commit("b", [0])
    logits_BQV, _ = lm.forward(["b", "a"], [Entries.chain([30]), Entries.chain([31])])
    torch.testing.assert_close(logits_BQV[0, 0], fresh_logits(model, [9, 8, 12, 30]), rtol=0, atol=1e-9)
    torch.testing.assert_close(logits_BQV[1, 0], fresh_logits(model, [3, 4, 5, 11, 21, 22, 31]), rtol=0, atol=1e-9)


def test_a_padding_query_gives_no_nan_and_disturbs_nothing(models: dict[str, Any]) -> None:
    model = models["gemma3"]
    lm = CachedLM(model, prepare(model), buckets=(8,))
    lm.open(0, 40)
    lm.open(1, 40)
    lm.prefill([0, 1], [list(range(3, 30)), [5]])
    logits_BQV, _ = lm.forward([0, 1], [Entries.chain([1, 2, 3]), Entries.chain([4])])
    assert logits_BQV.shape[1] == 8
    assert not torch.isnan(logits_BQV).any()
    torch.testing.assert_close(logits_BQV[1, 0], fresh_logits(model, [5, 4]), rtol=0, atol=1e-9)


def test_the_context_lies_in_memory_once_whatever_the_tree(models: dict[str, Any]) -> None:
    model = models["llama"]
    lm = CachedLM(model, prepare(model))
    lm.open(0, 400)
    lm.prefill([0], [[3] * 300])
    before = lm.cache.nbytes()
    for _ in range(3):
        lm.forward([0], [Entries([5] * 64, [-1] * 64)])
        lm.commit(0, [3])
    assert lm.cache.nbytes() == before
    layers, heads, size = 2, 2, 8
    assert before == 2 * layers * heads * size * lm.cache.slots * lm.dtype.itemsize
    assert lm.cache.slots < 2 * 400


def check_chunks(model: Any, plan: MaskPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill in chunks of 7 leaves the next logits and all hidden states of a fresh pass."""
    monkeypatch.setattr(cached_lm, "PREFILL_CHUNK", 7)
    lm = CachedLM(model, plan)
    texts = {row: [(5 * i + 11 * row) % VOCAB for i in range(length)] for row, length in enumerate((30, 3, 14, 15))}
    for row, text in texts.items():
        lm.open(row, len(text) + 2)
    chunks = lm.prefill(list(texts), list(texts.values()), hidden=True)
    logits_BQV, _ = lm.forward(list(texts), [Entries.chain([7]) for _ in texts])
    for row, text in texts.items():
        assert lm.length(row) == len(text)
        torch.testing.assert_close(logits_BQV[row, 0], fresh_logits(model, [*text, 7]), rtol=0, atol=1e-9)
        with torch.inference_mode():
            wanted = model(torch.tensor([text]), output_hidden_states=True, use_cache=False).hidden_states
        for layer, states in enumerate(wanted):
            found = torch.cat([chunk[layer] for chunk in chunks[row]])
            torch.testing.assert_close(found, states[0], rtol=0, atol=1e-9)


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
        ("offset += PREFILL_CHUNK", "offset += PREFILL_CHUNK + 1"),
        ("layer[b, : len(parts[b])]", "layer[0, : len(parts[b])]"),
    ],
)
def test_planted_chunk_that_skips_a_token_is_caught(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch, sound: str, fault: str
) -> None:
    plan = prepare(models["llama"])
    plant(monkeypatch, CachedLM, "prefill", sound, fault)
    with pytest.raises(AssertionError):
        check_chunks(models["llama"], plan, monkeypatch)


def check_growth() -> None:
    """Keys, values and states stay where they are when rows and slots are added."""
    cache, generator = TreeCache(), torch.Generator().manual_seed(1)
    cache.reserve(2, 6)
    cache.begin(0, np.arange(5)[None].repeat(2, 0), torch.device("cpu"))
    stored = {}
    for layer in range(2):
        key, value = (torch.randn(2, 3, 5, 4, generator=generator) for _ in range(2))
        cache.update(key, value, layer)
        states = torch.randn(2, 5, 7, generator=generator)
        cache.put_states(layer, states)
        stored[layer] = (key.transpose(1, 2), value.transpose(1, 2), states)
    for rows, slots in ((2, 7), (3, 7), (3, 600), (5, 1200)):
        cache.reserve(rows, slots)
        for layer, wanted in stored.items():
            for buffers, one in zip((cache.keys, cache.values, cache.states), wanted):
                assert buffers[layer].shape[:2] == (cache.rows, cache.slots)
                assert torch.equal(buffers[layer][:2, :5], one)
    assert cache.rows >= 5
    assert cache.slots >= 1200


def test_growth_keeps_keys_values_and_states() -> None:
    check_growth()


@pytest.mark.parametrize("fault", ["(self.keys, self.values)", "(self.keys, self.states)"])
def test_planted_growth_that_forgets_is_caught(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    plant(monkeypatch, TreeCache, "reserve", "(self.keys, self.values, self.states)", fault)
    with pytest.raises(AssertionError):
        check_growth()


def test_half_precision_on_a_cpu_pads_to_two_queries() -> None:
    assert liked_buckets(torch.device("cpu"), torch.bfloat16) == (2,)
    assert liked_buckets(torch.device("cpu"), torch.float32) == ()
    assert liked_buckets(torch.device("cuda"), torch.bfloat16) == ()
