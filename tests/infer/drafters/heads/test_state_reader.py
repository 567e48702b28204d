"""Medusa and Hydra heads that know a planted target's text are accepted to their last head; planted faults are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_heads as tiny
import torch
from decoded import accepted_length
from joining import admit, release
from planted import plant

from draftsmith.infer.contract.protocols import Budget
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.drafters import Hydra, Medusa
from draftsmith.infer.drafters.heads import state_reader
from draftsmith.infer.drafters.heads.newest_states import NewestStates
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.engine.step import step
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.recorded_target import RecordedTarget

HEADS = 4
MAKE: dict[str, Callable[..., Any]] = {
    "medusa": lambda **given: Medusa(tiny.planted_medusa(HEADS), **given),
    "hydra by path": lambda **given: Hydra(tiny.planted_hydra(HEADS, "path"), **given),
    "hydra by newest": lambda **given: Hydra(tiny.planted_hydra(HEADS, "newest"), **given),
    "hydra by state": lambda **given: Hydra(tiny.planted_hydra(HEADS, "state"), **given),
    "hydra++": lambda **given: Hydra(tiny.planted_hydra(HEADS, "state", prefix=True), **given),
}
STATELESS = [name for name in MAKE if name != "hydra++"]


@pytest.fixture(scope="module")
def target() -> HFTarget:
    return HFTarget(tiny.planted_target())


def make_rows(new: int = 21) -> list[Row]:
    return [Row(str(i), [(5 * i + j * j) % tiny.PLANTED_VOCAB for j in range(2 + 3 * i)], stops=Stops(new + i))
            for i in range(4)]  # fmt: skip


def decode(target: HFTarget, drafter: Any, batch_size: int = 1) -> list[Generation]:
    drafter.bind(target)
    rows = make_rows()
    done = generate(target, drafter, rows, batch_size=batch_size)
    for row, one in zip(rows, done):
        prompt = row.ids[: row.prompt_tokens]
        assert one.token_ids == [tiny.follower(prompt[-1], i + 1) for i in range(row.stops.max_new_tokens)]
    return done


def whole_steps(one: Generation) -> list[int]:
    """What was committed between the step that read the prompt to its end, and the last one."""
    return [trace.committed for trace in one.traces[1:-1]]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", MAKE)
def test_every_head_is_accepted_where_the_text_is_known(target: HFTarget, name: str, batch_size: int) -> None:
    for shape in ({"top_k": 1}, {"top_k": 3, "nodes": 16, "min_confidence": 0.0}):
        done = decode(target, MAKE[name](**shape), batch_size)
        for one in done:
            assert set(whole_steps(one)) == {HEADS + 1}
            assert len(whole_steps(one)) >= 3


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("name", MAKE)
def test_fewer_heads_are_run_if_fewer_tokens_are_asked_for(target: HFTarget, name: str, depth: int) -> None:
    drafter = MAKE[name](top_k=1, num_draft_tokens=depth)
    done = decode(target, drafter)
    assert set(whole_steps(done[0])) == {depth + 1}


def swap_heads(monkeypatch: pytest.MonkeyPatch, drafter: Any) -> None:
    heads = drafter.reader.method.heads
    heads.heads = torch.nn.ModuleList([*heads.heads][::-1])


def state_one_off(monkeypatch: pytest.MonkeyPatch, drafter: Any) -> None:
    plant(monkeypatch, NewestStates, "take", "states_TH[-1]", "states_TH[max(len(states_TH) - 2, 0)]")


def path_reversed(monkeypatch: pytest.MonkeyPatch, drafter: Any) -> None:
    plant(monkeypatch, state_reader, "path_to", "path[::-1]", "path")


def newest_left_out(monkeypatch: pytest.MonkeyPatch, drafter: Any) -> None:
    plant(monkeypatch, state_reader, "path_to", "[row.ids[-1]", "[row.ids[-2]")


FAULTS = [
    ("medusa", swap_heads), ("medusa", state_one_off), ("hydra by state", state_one_off),
    ("hydra by path", path_reversed), ("hydra by newest", newest_left_out),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_planted_faults_lower_what_is_accepted_and_leave_the_text(
    monkeypatch: pytest.MonkeyPatch, target: HFTarget, name: str, fault: Any
) -> None:
    drafter = MAKE[name](top_k=1)
    fault(monkeypatch, drafter)
    assert accepted_length(decode(target, drafter)) < 3


@pytest.mark.parametrize("name", MAKE)
def test_a_stop_token_inside_an_accepted_path_ends_the_row(target: HFTarget, name: str) -> None:
    drafter = MAKE[name](top_k=1)
    drafter.bind(target)
    answer = [tiny.follower(5, i + 1) for i in range(9)]
    (done,) = generate(target, drafter, [Row("0", [12, 22, 5], stops=Stops(40, frozenset(answer[-1:])))])
    assert done.token_ids == answer
    assert done.stop == "eos"
    assert (done.traces[-1].committed, done.traces[-1].accepted) == (3, 3)


@pytest.mark.parametrize("name", STATELESS)
def test_the_last_state_alone_is_kept_of_a_prompt(target: HFTarget, name: str) -> None:
    drafter = MAKE[name]()
    drafter.bind(target)
    row = Row("long", [i * i % tiny.PLANTED_VOCAB for i in range(300)])
    admit(target, drafter, [row], chunk=64)
    assert drafter.reader.states.there(row)
    (state_H,) = drafter.reader.states.newest([row])
    assert state_H.untyped_storage().nbytes() == 32 * 8
    whole = target.model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states[-1][0, -2]
    torch.testing.assert_close(state_H, whole)
    release(target, drafter, [row])
    assert not drafter.reader.states._found


@pytest.mark.parametrize("name", MAKE)
def test_without_a_state_for_the_newest_token_nothing_is_drafted(target: HFTarget, name: str) -> None:
    """A prompt of one token, and a new turn that the target has not read yet."""
    drafter = MAKE[name]()
    drafter.bind(target)
    row = Row("0", [3], stops=Stops(30))
    admit(target, drafter, [row])
    traces = [step(target, drafter, [row], Budget(16, 8))[0] for _ in range(2)]
    assert [trace.nodes > 0 for trace in traces] == [False, True]
    assert traces[1].accepted == HEADS
    row.turn([9, 4, tiny.follower(4)])
    assert len(drafter.propose([row], [Budget(16, 8)])[0]) == 0
    drafter.read([row], target.prefill([row], 512))
    (trace,) = step(target, drafter, [row], Budget(16, 8))
    assert trace.accepted == HEADS
    release(target, drafter, [row])


@pytest.mark.parametrize("name", STATELESS)
def test_a_lost_step_costs_one_step_of_drafts_and_no_text(target: HFTarget, name: str) -> None:
    """An error after the commit: the drafter never hears of the state, and must not draft from the old one."""
    drafter = MAKE[name]()
    drafter.bind(target)
    row = Row("0", [3, 10, 17], stops=Stops(40))
    admit(target, drafter, [row])
    step(target, drafter, [row], Budget(16, 8))
    observe, struck = drafter.observe, []

    def strike(*given: Any) -> None:
        struck.append(given)
        raise RuntimeError("out of memory")

    drafter.observe = strike
    with pytest.raises(RuntimeError):
        step(target, drafter, [row], Budget(16, 8))
    drafter.observe = observe
    target.abandon([row])
    drafter.abandon([row])
    traces = [step(target, drafter, [row], Budget(16, 8))[0] for _ in range(3)]
    assert [trace.accepted for trace in traces] == [0, HEADS, HEADS]
    assert row.new_ids == [tiny.follower(17, i + 1) for i in range(len(row.new_ids))]
    release(target, drafter, [row])


@pytest.mark.parametrize("name", MAKE)
def test_a_step_that_failed_is_drafted_again_alike(target: HFTarget, name: str) -> None:
    drafter = MAKE[name]()
    drafter.bind(target)
    rows = make_rows()
    admit(target, drafter, rows)
    first = drafter.propose(rows, [Budget(16, 8)] * len(rows))
    drafter.abandon(rows)
    again = drafter.propose(rows, [Budget(16, 8)] * len(rows))
    assert [one.tokens for one in first] == [one.tokens for one in again]
    assert all(one.tokens for one in first)
    release(target, drafter, rows)


def test_a_batch_is_one_pass_of_medusa_and_one_per_depth_of_hydra(target: HFTarget) -> None:
    calls: list[int] = []
    for name, passes in (("medusa", 1), ("hydra by path", HEADS)):
        drafter = MAKE[name](top_k=2, nodes=16, min_confidence=0.0, **({"width": 8} if "hydra" in name else {}))
        drafter.bind(target)
        rows = make_rows()
        admit(target, drafter, rows)
        heads = drafter.reader.method.heads
        calls.clear()
        modules = [heads] if name == "medusa" else [*heads.heads]
        hooks = [one.register_forward_hook(lambda module, given, made: calls.append(len(given[0]))) for one in modules]
        drafts = drafter.propose(rows, [Budget(16, 8)] * len(rows))
        for hook in hooks:
            hook.remove()
        assert len(calls) == passes
        assert calls[0] == len(rows)
        assert min(draft.depth for draft in drafts) == HEADS
        assert drafter.forward_seconds > 0
        assert drafter.bytes_moved > 0
        release(target, drafter, rows)


@pytest.mark.parametrize("name", MAKE)
def test_what_does_not_fit_is_refused(target: HFTarget, make_model: Any, name: str) -> None:
    with pytest.raises(ValueError, match="num_draft_tokens is at most 4"):
        MAKE[name](num_draft_tokens=5)
    drafter = MAKE[name]()
    with pytest.raises(ValueError, match="recorded answers have none"):
        drafter.bind(RecordedTarget({}, tiny.PLANTED_VOCAB, None))
    with pytest.raises(ValueError, match="states of width 32, and the target's are 48 wide"):
        drafter.bind(HFTarget(make_model("llama", hidden_size=48)))
    with pytest.raises(ValueError, match="draft 24 tokens, and the target has 20"):
        drafter.bind(HFTarget(make_model("llama", vocab_size=20)))


def test_an_engine_lets_rows_join_and_leave(target: HFTarget) -> None:
    engine = Engine(target, MAKE["medusa"](top_k=1), batch_size=2)
    rows = make_rows()
    done = engine.run(rows)
    assert all(set(whole_steps(one)) == {HEADS + 1} for one in done)
    assert not engine.drafter.reader.states._found
