"""Passes with static shapes give the logits of a fresh pass, transfer little, and are captured where there is CUDA.

Without a device the same passes run uncaptured: shapes, masks, splits and buffers are tested here, graphs are not."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from planted import plant

from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.drafters.controls import Empty, oracle
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.models.architectures import prepare
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.runner import static_reads
from draftsmith.infer.models.runner.arena import Arena
from draftsmith.infer.models.runner.captured import CapturedPasses
from draftsmith.infer.models.runner.entries import Entries
from draftsmith.infer.models.runner.model_runner import ModelRunner
from draftsmith.infer.models.runner.static_reads import StaticReads
from draftsmith.retrieval import PromptLookup

VOCAB = 61
KINDS = ["llama", "gemma3", "gemma2", "gpt2"]


@pytest.fixture(scope="module")
def models(make_model: Any) -> dict[str, Any]:
    return {kind: make_model(kind) for kind in KINDS}


@pytest.fixture(params=[64, static_reads.SPLIT], ids=["many splits", "one split"])
def split(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(static_reads, "SPLIT", request.param)
    return int(request.param)


@pytest.fixture
def static_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of every static pass, padding included."""
    seen: list[int] = []
    outside = CapturedPasses.outside

    def count(self: CapturedPasses, run: Callable[[], Any]) -> Any:
        found = outside(self, run)
        if found is not None:
            seen.append(len(found[0]))
        return found

    monkeypatch.setattr(CapturedPasses, "outside", count)
    return seen


def static_runner(model: Any) -> ModelRunner:
    lm = ModelRunner(model, prepare(model))
    assert lm.capture()
    return lm


def fresh_logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


def tree(rng: random.Random, size: int) -> tuple[list[int], list[int], list[int]]:
    """Tokens and parents of a random tree, and a path in it."""
    parents = [-1, *(rng.randrange(-1, i) for i in range(1, size))]
    at, path = size - 1, list[int]()
    while at >= 0:
        path.append(at)
        at = parents[at]
    return [rng.randrange(VOCAB) for _ in parents], parents, path[::-1]


def check_static(model: Any, rows: int, steps: int = 10) -> ModelRunner:
    """Random trees, kept paths, rows that share a prefix and rows that leave: all logits of all paths are right."""
    rng = random.Random(rows)
    # transformers' own attention with a cap computes its weights in float32.
    atol = 1e-6 if model.config.model_type == "gemma2" else 1e-9
    lm = static_runner(model)
    texts = {row: [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 40))] for row in range(rows)}
    for row in texts:
        lm.open(row)
    lm.prefill(list(texts), list(texts.values()))
    for number in range(steps):
        if number == 3:
            lm.fork(0, "forked", len(texts[0]) // 2)
            texts["forked"] = texts[0][: len(texts[0]) // 2]  # type: ignore[index]
        if number == 7 and rows > 1:
            lm.close(1)
            del texts[1]
        drafted = {row: tree(rng, rng.randrange(1, 13)) for row in texts}
        found = lm.forward(list(texts), [Entries(*drafted[row][:2]) for row in texts]).logits_NV
        at = 0
        for row, (tokens, _, path) in drafted.items():
            ids = [*texts[row], *(tokens[node] for node in path)]
            wanted_TV = fresh_logits(model, ids)[len(texts[row]) :]
            where = [at + node for node in path]
            torch.testing.assert_close(found[where], wanted_TV, rtol=0, atol=atol)
            texts[row] = ids
            at += len(tokens)
        lm.commit(list(texts), [drafted[row][2] for row in texts])
    return lm


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_static_passes_give_the_logits_of_a_fresh_pass(
    models: dict[str, Any], kind: str, rows: int, split: int, static_passes: list[int]
) -> None:
    lm = check_static(models[kind], rows)
    assert len(static_passes) >= 10
    assert lm.cache.lasting


def check_all(models: dict[str, Any]) -> None:
    for kind in ("gemma3", "llama"):
        check_static(models[kind], 3)
        check_growth(models[kind])
        check_deep_draft(models[kind])


@pytest.mark.parametrize(
    ("owner", "method", "sound", "fault"),
    [
        (StaticReads, "_seen", "rank_L < counts_S", "rank_L <= counts_S"),
        (StaticReads, "_seen", "distance_NL < window", "distance_NL <= window"),
        (StaticReads, "_seen", "own_NL & (near_NL", "(near_NL"),
        (StaticReads, "_seen", "pending_L & ancestor_NL", "pending_L"),
        (StaticReads, "_seen", "bit_L // 64", "bit_L // 32"),
        (static_reads, "_spans", "span[4] |= 1 << b", "span[4] = 1 << b"),
        (static_reads, "_spans", "at += count", "at += 0"),
        (static_reads, "_in_splits", "mask_QL.unflatten", "mask_QL.flip(1).unflatten"),
        (CapturedPasses, "_at", "self._captured.clear()", "pass"),
        (Arena, "_place", "self._copy(region, end)", "pass"),
    ],
)
def test_planted_fault_of_a_static_pass_is_caught(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch, owner: Any, method: str, sound: str, fault: str
) -> None:
    monkeypatch.setattr(static_reads, "SPLIT", 64)
    plant(monkeypatch, owner, method, sound, fault)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        check_all(models)


def check_growth(model: Any) -> None:
    """A row grows beyond its region, then beyond the arena; its logits stay those of a fresh pass."""
    lm = static_runner(model)
    rng = random.Random(5)
    texts = {row: [rng.randrange(VOCAB) for _ in range(20 + 9 * row)] for row in range(3)}
    for row, text in texts.items():
        lm.open(row, len(text))
    lm.prefill(list(texts), list(texts.values()))
    starts, sizes = set(), set()
    made: list[int] = []
    for number in range(9):
        if number == 2:
            lm.close(0)
            del texts[0]
        new = {row: [rng.randrange(VOCAB) for _ in range(20)] for row in texts}
        found = lm.forward(list(texts), [Entries.chain(ids) for ids in new.values()]).logits_NV
        for (row, ids), logits_TV in zip(new.items(), found.split(20)):
            texts[row] += ids
            torch.testing.assert_close(logits_TV, fresh_logits(model, texts[row])[-20:], rtol=0, atol=1e-9)
        lm.commit(list(texts), [range(20)] * len(texts))
        starts.add((lm.cache.size, *(region.start for region in lm.cache._regions)))
        sizes.add(lm.cache.size)
        assert lm.captured is not None
        made.append(len(lm.captured))
    assert any(later < earlier for earlier, later in pairwise(made)) or max(made) == 1, "old addresses are kept"
    assert len(sizes) >= 2, "the arena did not grow"
    assert len(starts) > len(sizes), "no region moved within the arena"


def check_deep_draft(model: Any) -> None:
    """More uncommitted entries than one word has bits, by several passes."""
    lm = static_runner(model)
    text, draft = [7, 8, 9], [(11 * i + 5) % VOCAB for i in range(70)]
    lm.open("a")
    lm.prefill(["a"], [text])
    found = [lm.forward(["a"], [Entries.chain([token], i)]).logits_NV for i, token in enumerate(draft)]
    torch.testing.assert_close(torch.cat(found), fresh_logits(model, text + draft)[3:], rtol=0, atol=1e-9)


def test_a_row_grows_within_the_arena_and_beyond_it(models: dict[str, Any], static_passes: list[int]) -> None:
    check_growth(models["gemma3"])
    assert set(static_passes) == {64}


def test_a_deep_draft_sees_its_ancestors(models: dict[str, Any], static_passes: list[int]) -> None:
    check_deep_draft(models["llama"])
    assert len(static_passes) >= 70


def test_what_does_not_fit_a_static_pass_runs_as_before(models: dict[str, Any], static_passes: list[int]) -> None:
    model = models["llama"]
    lm = static_runner(model)
    lm.open("a")
    lm.prefill(["a"], [[3, 4]])
    before = len(static_passes)
    tokens = [(7 * i + 3) % VOCAB for i in range(257)]  # more than the largest bucket
    found = lm.forward(["a"], [Entries.chain(tokens)]).logits_NV
    torch.testing.assert_close(found, fresh_logits(model, [3, 4, *tokens])[2:], rtol=0, atol=1e-9)
    lm.drop(["a"])
    lm.forward(["a"], [Entries([5] * 64, [-1] * 64)])
    assert static_passes[before:] == [64]
    lm.forward(["a"], [Entries([5] * 64, [-1] * 64)])
    found = lm.forward(["a"], [Entries([6], [-1])]).logits_NV  # the row has more entries than there are bits
    torch.testing.assert_close(found, fresh_logits(model, [3, 4, 6])[2:], rtol=0, atol=1e-9)
    assert static_passes[before:] == [64, 64]


def test_wanted_logits_and_tapped_states_come_out_of_a_static_pass(
    models: dict[str, Any], static_passes: list[int]
) -> None:
    model = models["llama"]
    lm, plain = static_runner(model), ModelRunner(model, prepare(model))
    for one in (lm, plain):
        for row in "ab":
            one.open(row)
        one.prefill("ab", [[3, 4], [5]])
    entries = [Entries([3, 4, 5], [-1, 0, 0]), Entries.chain([6, 7])]
    found, wanted = (one.forward("ab", entries, ["layer:1", "last"], [2, 1]) for one in (lm, plain))
    torch.testing.assert_close(found.logits_NV, wanted.logits_NV, rtol=0, atol=1e-9)
    for name in ("layer:1", "last"):
        torch.testing.assert_close(found.taps[name], wanted.taps[name], rtol=0, atol=1e-9)
    held = found.logits_NV.clone()
    lm.forward("ab", [Entries.chain([9, 9, 9], 3), Entries.chain([8, 8], 2)])
    assert torch.equal(found.logits_NV, held), "the next pass overwrote the logits of this one"
    assert static_passes[-2:] == [8, 8]


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_over_static_passes_is_lossless(models: dict[str, Any], kind: str, static_passes: list[int]) -> None:
    rng = random.Random(2)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(rng.randrange(3, 40))] for _ in range(5)]

    def decode(target: HFTarget, drafter: Any, batch_size: int) -> Any:
        drafter.bind(target)
        rows = [Row(str(i), list(ids), Settings(), Stops(40 - 3 * i)) for i, ids in enumerate(prompts)]
        return generate(target, drafter, rows, batch_size=batch_size)

    plain = [one.token_ids for one in decode(HFTarget(models[kind]), Empty(), 1)]
    wrong = [[*ids[:9], ids[9] ^ 1, *ids[10:]] for ids in plain]
    for answers in (plain, wrong):
        target, drafter = HFTarget(models[kind]), oracle()
        assert isinstance(target.lm, ModelRunner)
        assert target.lm.capture()
        drafter.learn({str(i): ids for i, ids in enumerate(answers)})
        found = decode(target, drafter, 3)
        assert [one.token_ids for one in found] == plain
        assert max(trace.accepted for one in found for trace in one.traces) >= 2
    assert any(not tried.accepted for one in found for trace in one.traces for tried in trace.tried)
    assert len({token for ids in plain for token in ids}) >= 8
    assert static_passes


def test_blocks_and_dense_layers_have_no_static_passes(make_model: Any) -> None:
    model = make_model("llama")
    assert not ModelRunner(model, prepare(model), exits=(1, 2)).capture()


@pytest.mark.parametrize("at", [20, 37], ids=["in the prompt", "its newest token"])
@pytest.mark.parametrize("settings", [Settings(), Settings(temperature=0.9, seed=3)], ids=["greedy", "sampled"])
def test_logits_that_are_no_numbers_end_their_own_row_only(
    make_model: Any, settings: Settings, at: int, static_passes: list[int]
) -> None:
    model = make_model("llama")
    rng = random.Random(4)
    texts = [[rng.randrange(3, 50) for _ in range(12)] for _ in range(5)]

    def rows() -> list[Row]:
        return [Row(str(i), list(ids), settings, Stops(10)) for i, ids in enumerate(texts)]

    target = HFTarget(model)
    wanted = [one.token_ids for one in generate(target, Empty(), rows())]
    unused = min(set(range(3, VOCAB)).difference(*texts, *wanted))
    with torch.no_grad():
        model.get_input_embeddings().weight[unused] = float("nan")
    target = HFTarget(model)
    assert isinstance(target.lm, ModelRunner)
    assert target.lm.capture()
    bad = Row("bad", [7] * at + [unused] + [7] * (37 - at), settings, Stops(10))
    found = Engine(target, PromptLookup(), batch_size=3).run([rows()[0], bad, *rows()[1:]])
    assert "row bad, position 38: the target's logits are NaN or infinite" in found.pop(1).error
    assert [one.token_ids for one in found] == wanted
    assert not any(one.error for one in found)
    assert static_passes
