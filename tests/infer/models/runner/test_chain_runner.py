"""A ChainRunner's logits are those of a plain forward pass, however its chains are cut, taken back and batched."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from planted import plant
from tiny_families import tiny_family

from draftsmith.infer.costs.timing import PassShape
from draftsmith.infer.models import chain_probe
from draftsmith.infer.models.architectures import prepare, prepare_target
from draftsmith.infer.models.chain_probe import CHAIN_TOLERANCE, chain_errors, check_chain, probed_chain_plan
from draftsmith.infer.models.pass_timer import chain_pass_timer
from draftsmith.infer.models.runner.chain_runner import ChainCache, ChainRunner
from draftsmith.infer.models.runner.entries import Entries
from draftsmith.infer.models.runner.masks import ChainPlan, MaskPlan

pytestmark = pytest.mark.filterwarnings("ignore")

CLOSE = 1e-4  # several families compute their states in float32, whatever the model's dtype


@functools.cache
def family(kind: str) -> tuple[Any, ChainPlan]:
    model = tiny_family(kind)
    plan = prepare_target(model)
    assert isinstance(plan, ChainPlan)
    return model, plan


def fresh(kind: str) -> ChainRunner:
    return ChainRunner(*family(kind))


def text(length: int, start: int = 0) -> list[int]:
    return [8 + (7 * at + start) % 72 for at in range(length)]


@torch.inference_mode()
def plain_logits(model: Any, ids: list[int]) -> torch.Tensor:
    logits_TV: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits_TV


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=CLOSE, rtol=CLOSE)


def started(kind: str, *lengths: int) -> tuple[ChainRunner, list[list[int]]]:
    """A runner with rows 0, 1, ... that have read these many tokens."""
    runner, texts = fresh(kind), [text(length, 5 * row) for row, length in enumerate(lengths)]
    rows = list(range(len(lengths)))
    for row in rows:
        runner.open(row, 100)
    runner.prefill(rows, texts)
    return runner, texts


KINDS = ["qwen3_next", "lfm3", "jamba"]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_unequal_counts_run_as_they_do_alone(kind: str) -> None:
    runner, texts = started(kind, 12, 30, 7)
    more = [text(count, 40 + count) for count in (3, 6, 1)]
    logits_NV = runner.forward([0, 1, 2], [Entries.chain(ids) for ids in more]).logits_NV
    for ids, new, found in zip(texts, more, logits_NV.split([3, 6, 1])):
        assert_close(found, plain_logits(runner.model, ids + new)[len(ids) :])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_rejected_leaves_no_trace(kind: str) -> None:
    runner, (ids,) = started(kind, 20)
    draft = text(5, 33)
    runner.forward([0], [Entries.chain(draft)])
    assert runner.uncommitted(0) == 5
    runner.commit([0], [range(2)])
    read = runner.length(0) - 20
    assert read == (2 if runner.plan.single else 0), "without states from within the draft, nothing of it is read"
    assert runner.uncommitted(0) == 0
    rest = draft[read:2] + text(4, 50)
    found = runner.forward([0], [Entries.chain(rest)]).logits_NV
    assert_close(found, plain_logits(runner.model, ids + draft[:read] + rest)[20 + read :])
    runner.commit([0], [range(len(rest))])
    assert runner.length(0) == 20 + read + len(rest)


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_entries_leave_no_trace(kind: str) -> None:
    runner, (ids,) = started(kind, 20)
    runner.forward([0], [Entries.chain(text(5, 33))])
    runner.drop([0])
    assert (runner.length(0), runner.uncommitted(0)) == (20, 0)
    found = runner.forward([0], [Entries.chain(text(3, 4))]).logits_NV
    assert_close(found, plain_logits(runner.model, ids + text(3, 4))[20:])


@pytest.mark.parametrize("kind", KINDS)
def test_uncommitted_entries_can_be_continued(kind: str) -> None:
    runner, (ids,) = started(kind, 20)
    first, second = text(3, 33), text(2, 44)
    runner.forward([0], [Entries.chain(first)])
    found = runner.forward([0], [Entries.chain(second, 3)]).logits_NV
    assert_close(found, plain_logits(runner.model, ids + first + second)[23:])
    runner.commit([0], [range(4)])
    assert runner.length(0) == (24 if runner.plan.single else 23), "up to the last states of an accepted token"


def test_states_at_the_end_of_a_segment_are_kept() -> None:
    runner, texts = started("qwen3_next", 20, 20)
    more = [text(3, 1), text(6, 2)]
    runner.forward([0, 1], [Entries.chain(ids) for ids in more])
    runner.commit([0, 1], [range(3), range(5)])
    assert [runner.length(row) for row in (0, 1)] == [23, 23]
    found = runner.forward([1], [Entries.chain(more[1][3:])]).logits_NV
    assert_close(found, plain_logits(runner.model, texts[1] + more[1])[23:])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_leave_and_join_and_the_cache_grows(kind: str) -> None:
    runner, texts = started(kind, 12, 30, 7)
    runner.close(0)
    runner.open("new", 400)
    found = runner.forward(["new", 2], [Entries.chain(text(9, 3)), Entries.chain(text(2, 8))]).logits_NV
    assert_close(found[:9], plain_logits(runner.model, text(9, 3)))
    assert_close(found[9:], plain_logits(runner.model, texts[2] + text(2, 8))[7:])
    assert not runner.has(0)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_those_of_a_plain_pass(kind: str) -> None:
    runner, texts = started(kind, 12, 30)
    output = runner.forward([0, 1], [Entries.chain(text(3, 1)), Entries.chain(text(1, 2))], ("last", "layer:1"))
    for row, new, start in ((0, text(3, 1), 0), (1, text(1, 2), 3)):
        with torch.inference_mode():
            states = runner.model(torch.tensor([texts[row] + new]), use_cache=False, output_hidden_states=True)
        for name, layer in (("last", -1), ("layer:1", 1)):
            found = output.taps[name][start : start + len(new)]
            assert_close(found, states.hidden_states[layer][0, len(texts[row]) :])


def test_a_branch_is_refused() -> None:
    runner, _ = started("qwen3_next", 12)
    with pytest.raises(AssertionError, match="cannot branch"):
        runner.forward([0], [Entries([5, 6], [-1, -1])])


def test_passes_are_timed() -> None:
    runner = fresh("qwen3_next")
    timer = chain_pass_timer(runner)
    shape = PassShape(rows=2, tokens=4, context=50)
    timer.place(shape.rows, shape.context)
    before = runner.forward_seconds
    timer.run(shape.tokens)
    assert runner.forward_seconds > before
    timer.close()
    assert not runner._chains


@pytest.mark.parametrize(
    ("kind", "plan"),
    [
        ("qwen3_next", ChainPlan()),
        ("jamba", ChainPlan(single=True)),
        ("lfm3", ChainPlan({"full_attention": None, "sliding_attention": 8}, by_kind=True)),
    ],
)
def test_the_plan_is_what_the_family_does(kind: str, plan: ChainPlan) -> None:
    model, found = family(kind)
    assert found == plan
    assert max(max(errors) for errors in chain_errors(model, plan, (29, 43))) < CHAIN_TOLERANCE


def test_a_draft_model_that_cannot_branch_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="qwen3_next has state-space or recurrent layers, whose state cannot branch"):
        prepare(family("qwen3_next")[0])


def test_a_model_that_takes_trees_gets_trees(make_model: Any) -> None:
    assert isinstance(prepare_target(make_model("llama")), MaskPlan)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("recurrent_gemma", "does not continue from its states"),
        ("minimax", "cannot decode chains: ValueError: MiniMax uses cache of its own"),
        ("nemotron_h", "differ from a plain forward pass"),
        ("zamba2", "generate and a plain forward pass of the model differ"),
        ("rwkv", "takes no cache"),
    ],
)
def test_a_family_whose_chains_come_out_wrong_is_refused_with_the_reason(kind: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        probed_chain_plan(tiny_family(kind))


FAULTS = [
    (ChainRunner, "drop", "chain.ahead.clear()", "chain.states = chain.newest; chain.ahead.clear()"),
    (ChainRunner, "_segment", "min(left[b] for b in some)", "max(left[b] for b in some)"),
    (ChainRunner, "commit", "if count <= len(path)", "if count"),
    (ChainCache, "begin", "torch.cat([state[key] for state in states])", "states[0][key]"),
    (ChainCache, "update_conv_state", "known[..., known.shape[-1] - size :]", "known[..., :size]"),
]


@pytest.mark.parametrize(("owner", "name", "sound", "fault"), FAULTS, ids=[fault[1] for fault in FAULTS])
def test_planted_faults_are_found_by_the_probe(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, sound: str, fault: str
) -> None:
    model, plan = family("qwen3_next")
    plant(monkeypatch, owner, name, sound, fault)
    outcome = chain_probe._outcome(model, plan)
    assert isinstance(outcome, str) or outcome > CHAIN_TOLERANCE


def test_a_loaded_model_whose_own_chains_come_out_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = family("qwen3_next")
    plant(monkeypatch, ChainCache, "update_conv_state", "known[..., known.shape[-1] - size :]", "known[..., :size]")
    with pytest.raises(ValueError, match="depend on how the text was cut into passes"):
        check_chain(model, plan)
