"""REST without a store: it begins with nothing, learns finished answers within a bound, and never changes the text."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from decoded import assert_tried_hard

from draftsmith.infer.contract.protocols import Budget, LearnsAnswers
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.measure.recordings import Recording
from draftsmith.infer.measure.replay import Replay
from draftsmith.infer.measure.runners import LoopRunner, Prompt
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.recorded_target import RecordedTarget
from draftsmith.retrieval.rest.drafter import LEAD

VOCAB = 61
SAMPLED = Settings(temperature=0.9, top_k=40, seed=11)
ANSWER = [5, 6, 7, 8, 9, 10]


def bound(retrieval: Any, target: Any, **kwargs: Any) -> Any:
    drafter = retrieval.Rest(**kwargs)
    drafter.bind(target)
    return drafter


def make_rows(settings: Settings, again: str = "") -> list[Row]:
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (3, 30, 8, 17, 25, 4, 12, 39)]
    return [Row(f"{i}{again}", prompt, settings, Stops(40 - 3 * i)) for i, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def model(make_model: Any) -> Any:
    return make_model("llama")


@pytest.mark.parametrize("settings", [Settings(), SAMPLED], ids=["greedy", "sampled"])
def test_text_is_plain_s_while_the_drafts_get_better_with_every_answer(
    model: Any, settings: Settings, retrieval: Any
) -> None:
    target = HFTarget(model)
    plain = [one.token_ids for one in Engine(target, Empty()).run(make_rows(settings))]
    # Rows that draw other tokens from the same prompts come first, so that what was learned is often wrong.
    others = [one.token_ids for one in Engine(target, Empty()).run(make_rows(SAMPLED, "b"))]
    assert others != plain
    for batch_size in (1, 3, 8):
        drafter = bound(retrieval, target, nodes=24, threads=2 if batch_size == 3 else 1)
        engine = Engine(target, drafter, batch_size=batch_size)
        first = engine.run(make_rows(SAMPLED, "b"))
        before = engine.run(make_rows(settings))
        after = engine.run(make_rows(settings))
        assert [one.token_ids for one in first] == others
        assert [one.token_ids for one in before] == [one.token_ids for one in after] == plain
        steps = [sum(len(one.traces) for one in some) for some in (before, after)]
        assert steps[1] < 0.5 * steps[0]
        assert_tried_hard([*before, *after], deep=4)


def test_an_answer_is_learned_with_the_end_of_its_prompt_and_its_end_is_not_crossed(retrieval: Any) -> None:
    prompt = list(range(20, 20 + LEAD + 4))
    target = RecordedTarget({"a": ANSWER, "b": [90, 91]}, 100)
    drafter = bound(retrieval, target, context_weight=0.0)
    assert len(retrieval.propose(drafter, [prompt])[0]) == 0
    Engine(target, drafter).run([Row("a", prompt, stops=Stops(6)), Row("b", [89], stops=Stops(2))])
    begun, inside, end, other, early = retrieval.propose(drafter, [prompt, [7], [10], [90], prompt[:3]])
    assert (begun.tokens, inside.tokens, other.tokens) == (ANSWER, [8, 9, 10], [91])
    assert len(end) == len(early) == 0


def test_what_was_aborted_or_failed_is_not_learned(retrieval: Any) -> None:
    target = RecordedTarget({"a": ANSWER}, 100)
    drafter = bound(retrieval, target, context_weight=0.0)
    engine = Engine(target, drafter)
    row = engine.add(Row("a", [4], stops=Stops(6)))
    engine.step()
    engine.step()
    assert row.new_ids
    engine.abort(row)
    engine.run([Row("not recorded", [4])])
    assert len(drafter._added) == 0
    assert [len(draft) for draft in retrieval.propose(drafter, [[5]])] == [0]


def test_a_kept_row_teaches_each_turn_once(retrieval: Any) -> None:
    target = RecordedTarget({"a": ANSWER}, 100)
    drafter = bound(retrieval, target)
    engine = Engine(target, drafter)
    row = engine.add(Row("a", [4], stops=Stops(3)), keep=True)
    while engine.busy:
        engine.step()
    assert len(drafter._added) == len([4, *ANSWER[:3]]) + 1
    engine.resume(row, [30])
    assert len(drafter._added) == len([4, *ANSWER[:3]]) + 1
    engine.close()
    assert len(drafter._added) == len([4, *ANSWER[:3]]) + 1


def test_the_oldest_answers_are_forgotten_over_the_bound(retrieval: Any) -> None:
    drafter = bound(retrieval, RecordedTarget({}, 100), context_weight=0.0, max_arrived=64)
    for first in range(0, 90, 3):
        drafter.add_answer(Row("r", [first, first + 1, first + 2, 99], prompt_tokens=1))
    assert len(drafter._added) <= 64
    old, new = retrieval.propose(drafter, [[0], [87]])
    assert (len(old), new.tokens) == (0, [88, 89, 99])


def test_a_store_is_left_alone_unless_it_is_asked_to_learn(tmp_path: Any, retrieval: Any) -> None:
    store = retrieval.write_store(tmp_path / "s", [[1, 2, 3]])
    target = RecordedTarget({"a": ANSWER}, 100)
    for learn, known in ((None, []), (True, [6, 7, 8, 9, 10])):
        drafter = bound(retrieval, target, store=str(store), learn=learn)
        assert isinstance(drafter, LearnsAnswers)
        Engine(target, drafter).run([Row("a", [4], stops=Stops(6))])
        found, stored = retrieval.propose(drafter, [[5], [1]])
        assert (found.tokens, stored.tokens) == (known, [2, 3])
    engine = Engine(target, bound(retrieval, target), learn=False)
    engine.run([Row("a", [4], stops=Stops(6))])
    assert len(engine.drafter._added) == 0  # type: ignore[attr-defined]


def test_binding_it_forgets_and_takes_the_new_target_s_vocabulary(retrieval: Any) -> None:
    drafter = bound(retrieval, RecordedTarget({}, 100), context_weight=0.0)
    drafter.add_document([1, 2, 3])
    with pytest.raises(ValueError, match="token id 100 is outside the vocabulary of 100"):
        drafter.add_document([100])
    drafter.bind(RecordedTarget({}, 70_000))
    drafter.add_document([65_535, 69_999, 4])
    lost, found = retrieval.propose(drafter, [[1], [65_535]])
    assert (len(lost), found.tokens) == (0, [69_999, 4])


def test_what_learning_needs_is_missed_before_the_first_answer(retrieval: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydivsufsort", None)
    with pytest.raises(ValueError, match=r"pip install 'draftsmith\[retrieval\]'"):
        bound(retrieval, RecordedTarget({}, 100))
    with pytest.raises(ValueError, match="the store's name is empty"):
        retrieval.Rest("")


def test_a_benchmark_asks_every_question_as_if_it_were_the_first(model: Any, retrieval: Any) -> None:
    runner = LoopRunner("rest", HFTarget(model), retrieval.Rest(), Settings(), Stops(20))
    prompts = [Prompt("q/0", [9, 8, 7])]
    first, again = runner.run(prompts), runner.run(prompts)
    assert [trace.nodes for trace in first[0].traces] == [trace.nodes for trace in again[0].traces]


def test_a_replay_learns_by_arrival_and_refuses_without(retrieval: Any) -> None:
    streams = [Recording(key, "", [30, 31], ANSWER) for key in "ab"]
    found = Replay(streams, 100, arrival=True).run({"rest": retrieval.Rest()})["rest"]
    assert [len(one.traces) for one in found.done] == [6, 1]
    with pytest.raises(ValueError, match="drafter 'rest' has nothing to draft from but the answers that arrive"):
        Replay(streams, 100).run({"rest": retrieval.Rest()})
    assert retrieval.propose(bound(retrieval, RecordedTarget({}, 100)), [[3, 4, 3]], Budget(2, 2))[0].tokens == [4, 3]
