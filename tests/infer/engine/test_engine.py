"""The engine's promises about rows: they join, are read beside others, end alone, stay for a new turn, never leak."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from noting import VOCAB, Noting, plain, prompts

from draftsmith.infer.contract.draft import OUTRIGHT, ROOT, Draft, Trial
from draftsmith.infer.contract.protocols import Budget, Feedback
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.drafters import SmallLM
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.engine.seats import fair_share
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.recorded_target import RecordedTarget
from draftsmith.infer.models.runner.model_runner import ModelRunner
from draftsmith.retrieval import PromptLookup


@pytest.fixture(scope="module")
def model(make_model: Any) -> Any:
    return make_model("llama")


@pytest.fixture
def target(model: Any) -> HFTarget:
    return HFTarget(model)


def test_a_long_prompt_is_read_in_chunks_and_stalls_nobody(model: Any, target: HFTarget) -> None:
    (long,), (short,) = prompts(1, long=90), prompts(1)
    drafter = Noting()
    engine = Engine(target, drafter, batch_size=2, chunk=8)
    first = engine.add(Row("short", short, stops=Stops(30)))
    engine.step()
    engine.step()
    second = engine.add(Row("long", long, stops=Stops(5)))
    rounds = 0
    while not second.new_ids:
        before = len(drafter.given)
        tokens = {event.row: event.tokens for event in engine.step()}
        assert len(tokens[first]) == 1
        assert sum(one.count for one in drafter.given[before:]) <= 8
        rounds += 1
    assert rounds == -(-(len(long) - 1) // 8)
    while engine.busy:
        engine.step()
    assert first.new_ids == plain(model, short, 30)
    assert second.new_ids == plain(model, long, 5)


@pytest.mark.parametrize(
    ("unread", "chunk", "limit"),
    [([5], 512, 5), ([600], 512, 512), ([600, 20], 512, 492), ([9, 9, 9], 3, 1), ([4, 4, 4], 12, 4), ([7, 0, 9], 8, 4)],
)
def test_short_rows_leave_their_share_of_the_chunk_to_long_ones(unread: list[int], chunk: int, limit: int) -> None:
    assert fair_share(unread, chunk) == limit
    assert sum(min(one, limit) for one in unread) <= chunk


def too_many(row: Row, budget: Budget) -> Draft:
    draft = Draft()
    for token in range(budget.nodes + 1):
        draft.outright(ROOT, token, "noting")
    return draft


def too_deep(row: Row, budget: Budget) -> Draft:
    return Draft().chain([3] * (budget.depth + 1), "noting")


def foreign(row: Row, budget: Budget) -> Draft:
    draft = Draft().chain([3, 4][: budget.depth], "noting")
    if len(draft) == 2:
        draft.trials[ROOT].append(Trial(1, OUTRIGHT, "noting", 1.0))
    return draft


def a_probe(row: Row, budget: Budget) -> Draft:
    draft = Draft()
    if budget.depth:
        draft.trials[ROOT] = [Trial(draft.probe(ROOT, 3), OUTRIGHT, "noting", 1.0)]
    return draft


def outside(row: Row, budget: Budget) -> Draft:
    return Draft().chain([VOCAB][: budget.depth], "noting")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (too_many, "noting proposed 17 nodes, and its budget is 16"),
        (too_deep, "noting proposed a draft of depth 9, and its budget is 8"),
        (foreign, "noting: a trial of noting below node -1 names node 1, whose parent is 0"),
        (a_probe, "noting: a trial of noting names node 0, a probe"),
        (outside, "noting: the drafter proposed token id 61, outside the target's vocabulary of 61"),
    ],
)
@pytest.mark.parametrize("new_turn", [False, True])
def test_a_draft_that_breaks_the_contract_ends_its_row_and_no_other(
    model: Any, target: HFTarget, make: Callable[[Row, Budget], Draft], message: str, new_turn: bool
) -> None:
    bad, *good = [Row(str(i), ids, stops=Stops(14)) for i, ids in enumerate(prompts(3))]
    drafter = Noting(
        lambda row, budget: make(row, budget) if row is bad and bad.prompt_tokens > 4 * new_turn else Draft()
    )
    engine = Engine(target, drafter, batch_size=3, budget=Budget(16, 8))
    for row in (bad, *good):
        engine.add(row, keep=row is bad)
    while new_turn and not bad.stop:
        engine.step()
    if new_turn:
        assert bad.stop == "max_new_tokens"
        engine.resume(bad, [5, 6, 7])
    done = {}
    while engine.busy:
        done |= {event.row: event.done for event in engine.step() if event.done}
    assert (bad.stop, done[bad].stop) == ("error", "error")
    assert done[bad].error.startswith(message)
    assert len(engine) == 0
    assert not drafter.open_now
    for row in good:
        assert not done.get(row) or not done[row].error
        assert row.new_ids == plain(model, row.ids[: row.prompt_tokens], 14)


def test_logits_that_are_no_numbers_end_their_row_and_leave_the_cache_clean(make_model: Any) -> None:
    model = make_model("llama")
    texts = prompts(6)
    wanted = [plain(model, ids, 12) for ids in texts]
    unused = min(set(range(3, VOCAB)).difference(*texts, *wanted))
    with torch.no_grad():
        model.get_input_embeddings().weight[unused] = float("nan")
    target = HFTarget(model)
    rows = [Row(str(i), ids, stops=Stops(12)) for i, ids in enumerate(texts)]
    bad = Row("bad", [texts[0][0]] * 37 + [unused], stops=Stops(12))
    done = Engine(target, PromptLookup(), batch_size=2).run([rows[0], bad, *rows[1:]])
    assert "row bad, position 38: the target's logits are NaN or infinite" in done.pop(1).error
    assert [one.token_ids for one in done] == wanted
    assert not any(one.error for one in done)


def test_what_fails_while_a_row_joins_is_the_row_s_error_and_leaves_nothing_behind(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that runs out where the row is opened; a drafter that does not take the row; one that does not read it."""
    target, opened = HFTarget(model), ModelRunner.open
    rows = [Row(str(i), ids, stops=Stops(6)) for i, ids in enumerate(prompts(4))]

    def open_row(runner: ModelRunner, row: Row, room: int = 0) -> None:
        if room > 300:
            raise RuntimeError("out of memory")
        opened(runner, row, room)

    class Choosy(Noting):
        def open(self, rows: Sequence[Row]) -> None:
            if any(row.key == "2" for row in rows):
                raise KeyError("not this one")
            super().open(rows)

        def read(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
            if any(row.key == "3" for row in rows):
                raise ValueError("unreadable")

    monkeypatch.setattr(ModelRunner, "open", open_row)
    rows[1] = Row("1", rows[1].ids * 60, stops=Stops(6))
    drafter = Choosy()
    done = Engine(target, drafter, batch_size=4).run(rows)
    assert [one.error for one in done] == ["", "out of memory", "'not this one'", "unreadable"]
    assert done[0].token_ids == plain(model, rows[0].ids[:4], 6)
    assert not any(target.lm.has(row) for row in rows)
    assert not target._features
    assert not drafter.open_now


def test_an_interrupt_while_a_row_joins_leaves_it_waiting(model: Any, target: HFTarget) -> None:
    class Interrupted(Noting):
        times = 0

        def open(self, rows: Sequence[Row]) -> None:
            self.times += 1
            if self.times == 1:
                raise KeyboardInterrupt
            super().open(rows)

    (ids,) = prompts(1)
    engine = Engine(target, Interrupted())
    row = engine.add(Row("0", ids, stops=Stops(6)))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert not target.lm.has(row)
    while engine.busy:
        engine.step()
    assert row.new_ids == plain(model, ids, 6)


def test_rows_that_cannot_be_decoded_are_refused_at_once_and_fail_alone_in_a_run(model: Any, target: HFTarget) -> None:
    engine = Engine(target)
    wrong = {
        "outside the target's vocabulary of 61": Row("a", [3, VOCAB]),
        "tokens, but the target's context ends at 512": Row("b", [3] * 512),
        "row c has ended (eos)": Row("c", [3], stop="eos"),
        "may generate no further token": Row("d", [3, 4, 5], stops=Stops(1), prompt_tokens=2),
    }
    for message, row in wrong.items():
        with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
            engine.add(row)
    good = Row("0", [3, 4], stops=Stops(5))
    done = engine.run([*wrong.values(), good])
    assert [message in one.error for message, one in zip(wrong, done)] == [True] * 4
    assert done[4].token_ids == plain(model, [3, 4], 5)
    with pytest.raises(ValueError, match="vocabulary of 61"):
        engine.run([good_again := Row("1", [3, 4]), Row("a", [3, VOCAB])], strict=True)
    assert len(engine) == 0
    assert not target.lm.has(good_again)


def test_a_row_that_has_ended_is_never_decoded_again(target: HFTarget) -> None:
    drafter = Noting()
    engine = Engine(target, drafter, batch_size=3)
    rows = [Row(str(i), ids, stops=Stops(2 + 3 * i)) for i, ids in enumerate(prompts(3))]
    for row in rows:
        engine.add(row, keep=True)
    while engine.busy:
        ended = [row for row in rows if row.stop]
        before = len(drafter.proposed)
        engine.step()
        assert not any(row in ended for some in drafter.proposed[before:] for row in some)
    engine.step()
    assert [len(row.new_ids) for row in rows] == [2, 5, 8]
    assert sum(map(len, drafter.proposed)) == 15 - 3, "a prompt's own pass gives the first token"
    with pytest.raises(ValueError, match="in the engine already"):
        engine.add(rows[0])
    engine.close()
    assert not drafter.open_now
    with pytest.raises(ValueError, match="row 0 has ended"):
        engine.add(rows[0])


@pytest.mark.parametrize("drafted", [False, True])
def test_a_kept_row_goes_on_from_its_cache(model: Any, shake: Any, target: HFTarget, drafted: bool) -> None:
    drafter = SmallLM(shake(model, 0.05), top_k=2) if drafted else PromptLookup()
    drafter.bind(target)
    kept, other = (Row(str(i), ids, stops=Stops(10)) for i, ids in enumerate(prompts(2)))
    engine = Engine(target, drafter, batch_size=2, chunk=6)
    engine.add(kept, keep=True)
    engine.add(other)
    while engine.busy:
        engine.step()
    assert len(engine) == 1
    for turn in ([7, 8, 9] * 9, [4], []):
        length = target.lm.length(kept)
        wanted = plain(model, [*kept.ids, *turn], 10)
        for bad, message in (([VOCAB], "vocabulary of 61"), ([3] * 600, "context ends at 512")):
            with pytest.raises(ValueError, match=message):
                engine.resume(kept, bad)
        assert kept.stop
        engine.resume(kept, turn)
        assert target.lm.length(kept) == length
        with pytest.raises(ValueError, match="is not kept"):
            engine.resume(kept, [3])
        events = []
        while engine.busy:
            events += engine.step()
        assert events[-1].done is not None
        assert events[-1].done.token_ids == kept.new_ids == wanted
        assert sum(trace.committed for trace in events[-1].done.traces) == 10
    engine.abort(kept)
    assert not target.lm.has(kept)
    assert not engine.busy


def test_a_row_can_be_aborted_in_any_state(model: Any, target: HFTarget) -> None:
    drafter = Noting()
    engine = Engine(target, drafter, batch_size=2, chunk=4)
    live, read, waits = (Row(name, ids, stops=Stops(20)) for name, ids in zip("abc", prompts(3, long=30)))
    engine.add(live)
    while not live.new_ids:
        engine.step()
    engine.add(read)
    engine.step()
    engine.add(waits)
    tokens = list(live.new_ids)
    assert 0 < target.unread(read)
    for row in (live, read, waits):
        engine.abort(row)
        assert row not in engine
    with pytest.raises(ValueError, match="is not in the engine"):
        engine.abort(live)
    events = engine.step()
    assert [(event.row, event.done.stop) for event in events if event.done] == [
        (r, "aborted") for r in (live, read, waits)
    ]
    assert live.new_ids == tokens == plain(model, live.ids[:30], 20)[: len(tokens)]
    assert not drafter.open_now
    assert not any(target.lm.has(row) for row in (live, read, waits))
    assert not engine.busy


def test_streams_run_side_by_side_and_closing_one_ends_its_row(model: Any, target: HFTarget) -> None:
    engine = Engine(target, PromptLookup(), batch_size=3)
    texts = prompts(3)
    beside = engine.add(Row("beside", texts[2], stops=Stops(4)))
    first, second = (engine.stream(Row(str(i), ids, stops=Stops(12))) for i, ids in enumerate(texts[:2]))
    found = [[next(stream)] for stream in (first, second)]
    for _ in range(5):
        found[0].append(next(first))
    found[1] += list(second)
    assert found[1] == plain(model, texts[1], 12)
    assert found[0] == plain(model, texts[0], 12)[:6]
    first.close()  # type: ignore[attr-defined]
    events = engine.step()
    assert {event.row for event in events} == {beside}
    assert beside.new_ids == plain(model, texts[2], 4)
    assert len(engine) == 0


def test_a_stream_raises_its_row_s_error(target: HFTarget) -> None:
    engine = Engine(target, Noting(too_deep))
    with pytest.raises(ValueError, match="nodes"):
        list(engine.stream(Row("0", [3, 4])))
    assert not engine.busy


def test_a_callback_that_raises_ends_the_run_and_spares_the_other_rows(model: Any, target: HFTarget) -> None:
    engine = Engine(target, batch_size=3)
    texts = prompts(3)
    beside = engine.add(Row("beside", texts[2], stops=Stops(4)))

    def stop(row: Row, tokens: list[int]) -> None:
        if len(row.new_ids) > 2:
            raise KeyboardInterrupt

    rows = [Row(str(i), ids) for i, ids in enumerate(texts[:2])]
    with pytest.raises(KeyboardInterrupt):
        engine.run(rows, on_tokens=stop)
    assert not any(target.lm.has(row) for row in rows)
    events = []
    while engine.busy:
        events += engine.step()
    assert [token for event in events for token in event.tokens] == beside.new_ids == plain(model, texts[2], 4)


def test_a_replay_reads_prompts_like_any_target() -> None:
    target = RecordedTarget({"0": [4, 5, 6, 7]}, 20)
    drafter = Noting()
    engine = Engine(target, drafter, chunk=3)
    (done,) = engine.run([Row("0", [1, 2, 3, 4, 5, 6], stops=Stops(4))])
    assert done.token_ids == [4, 5, 6, 7]
    assert [(one.start, one.count) for one in drafter.given] == [(0, 3), (3, 3)]
    assert not target._read


def test_sizes_below_one_are_refused(target: HFTarget) -> None:
    for name in ("batch_size", "chunk"):
        sizes: dict[str, Any] = {name: 0}
        with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
            Engine(target, **sizes)


def test_settings_belong_to_the_row(model: Any, target: HFTarget) -> None:
    warm = Settings(temperature=1.0, seed=3)
    rows = [Row("0", [3, 4, 5], warm, Stops(10)), Row("1", [3, 4, 5], Settings(), Stops(10))]
    done = Engine(target, PromptLookup(), batch_size=2).run(rows)
    assert done[0].token_ids != done[1].token_ids == plain(model, [3, 4, 5], 10)
    assert done[0].token_ids == Engine(target).run([Row("0", [3, 4, 5], warm, Stops(10))])[0].token_ids
