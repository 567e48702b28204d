"""The pass that reads the end of a prompt gives the row's first token; the drafter ends where it would have ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from noting import Noting, plain, prompts

from draftsmith.infer.contract.protocols import Feedback
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.trace import StepTrace
from draftsmith.infer.drafters import SmallLM
from draftsmith.infer.drafters.controls import oracle
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.engine.seats import PassShares
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.runner.entries import Entries, PassOutput


@pytest.fixture(scope="module")
def model(make_model: Any) -> Any:
    return make_model("llama")


def counted(target: HFTarget) -> list[int]:
    """The tokens of every pass of `target` from now on."""
    found: list[int] = []
    forward = target.lm.forward

    def counting(rows: Sequence[Row], entries: Sequence[Entries], *args: Any, **named: Any) -> PassOutput:
        found.append(sum(len(entry.tokens) for entry in entries))
        return forward(rows, entries, *args, **named)

    target.lm.forward = counting  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize(("chunk", "passes"), [(512, [60, 1, 1, 1]), (25, [25, 25, 10, 1, 1, 1]), (59, [60, 1, 1, 1])])
def test_a_prompt_costs_no_pass_of_its_own(model: Any, chunk: int, passes: list[int]) -> None:
    target = HFTarget(model, buckets=())
    found = counted(target)
    (ids,) = prompts(1, long=60)
    (done,) = Engine(target, Noting(), chunk=chunk).run([Row("0", ids, stops=Stops(4))])
    assert found == passes
    assert done.token_ids == plain(model, ids, 4)
    assert [trace.read for trace in done.traces] == [passes[-4] - 1, 0, 0, 0]


def test_the_ends_of_several_prompts_stay_within_the_chunk(model: Any) -> None:
    target = HFTarget(model, buckets=())
    found = counted(target)
    rows = [Row(str(i), ids, stops=Stops(3)) for i, ids in enumerate(prompts(4, long=21))]
    done = Engine(target, Noting(), batch_size=4, chunk=32).run(rows)
    assert max(found) <= 32 + len(rows)
    assert len({trace.step for one in done for trace in one.traces if trace.read}) < 4, "some ends are read together"
    assert [one.token_ids for one in done] == [plain(model, row.ids[:21], 3) for row in rows]


def test_a_drafter_reads_the_whole_prompt_after_the_first_token_was_reported(model: Any) -> None:
    (ids,) = prompts(1, long=20)
    drafter = Noting()
    engine = Engine(HFTarget(model), drafter)
    row = engine.add(Row("0", ids, stops=Stops(6)))
    (event,) = engine.step()
    assert event.tokens == row.new_ids == plain(model, ids, 1)
    assert (drafter.given, drafter.proposed) == ([], [])
    engine.step()
    assert drafter.given == [Feedback(0, 20)]
    assert drafter.proposed == [[row]]


@pytest.mark.parametrize("turns", [1, 2])
def test_a_draft_model_that_read_late_is_accepted_to_its_full_depth(model: Any, turns: int) -> None:
    """The draft is the target itself: one token of its cache in the wrong place, and it would be refused."""
    target = HFTarget(model)
    drafter = SmallLM(model, num_draft_tokens=4, top_k=1, min_confidence=0.0)
    drafter.bind(target)
    engine = Engine(target, drafter, batch_size=3)
    rows = [engine.add(Row(str(i), ids, stops=Stops(16)), keep=True) for i, ids in enumerate(prompts(3, long=25))]
    for turn in range(turns):
        if turn:
            for row in rows:
                engine.resume(row, [5, 6, 7])
        ended = []
        while engine.busy:
            ended += [event.done for event in engine.step() if event.done]
        for one in ended:
            assert [(trace.read > 0, trace.nodes, trace.accepted) for trace in one.traces] == [
                (True, 0, 0), (False, 4, 4), (False, 4, 4), (False, 4, 4)
            ]  # fmt: skip


def test_a_row_that_stops_at_its_first_token_is_not_read_by_the_drafter_until_it_goes_on(model: Any) -> None:
    (ids,) = prompts(1, long=12)
    drafter = Noting()
    engine = Engine(HFTarget(model), drafter)
    row = engine.add(Row("0", ids, stops=Stops(1)), keep=True)
    while engine.busy:
        engine.step()
    assert drafter.given == []
    engine.resume(row, [5, 6, 7])
    while engine.busy:
        engine.step()
    assert drafter.given == [Feedback(0, 12)]
    engine.resume(row, [8], Stops(2))
    while engine.busy:
        engine.step()
    assert drafter.given == [Feedback(0, 12), Feedback(12, 4), Feedback(16, 2)]


def test_a_drafter_that_needs_no_reading_drafts_behind_the_prompt_at_once(model: Any) -> None:
    (ids,) = prompts(1, long=20)
    drafter = oracle(4)
    drafter.learn({"0": plain(model, ids, 10)})
    target = HFTarget(model, buckets=())
    drafter.bind(target)
    found = counted(target)
    (done,) = Engine(target, drafter).run([Row("0", ids, stops=Stops(10))])
    assert found == [24, 5]
    assert [trace.accepted for trace in done.traces] == [4, 4]


def traces_of(score_s: float, *read: int) -> list[StepTrace]:
    return [
        StepTrace("0", 0, len(read), 9, 0, 0, 0, 0, 1, score_s=score_s, target_forward_s=score_s / 2, read=one)
        for one in read
    ]


def test_a_pass_that_reads_a_prompt_counts_as_one_that_does_not() -> None:
    shares = PassShares()
    first = traces_of(1.0, 18, 0)
    assert shares.book(first) == pytest.approx(0.9), "by tokens, before a step was measured"
    assert [(one.score_s, one.target_forward_s) for one in first] == [pytest.approx((0.1, 0.05))] * 2
    assert shares.book(alone := traces_of(0.25, 0, 0)) == 0.0
    assert alone[0].score_s == 0.25
    mixed = traces_of(1.0, 7, 0, 7)
    assert shares.book(mixed) == pytest.approx(0.375), "two rows share what reading took"
    assert {one.score_s for one in mixed} == {0.25}
    assert shares.book(traces_of(0.2, 7)) == 0.0, "no less than nothing"
