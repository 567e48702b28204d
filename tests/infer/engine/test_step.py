"""The contract of a step: limits, stops, features, traces, and what a target or drafter may not do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from planted import plant

from draftsmith.infer.contract.draft import ROOT, Draft, Group
from draftsmith.infer.contract.protocols import Budget, Feedback, Verdict
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.drafters import SmallLM
from draftsmith.infer.drafters.controls import Empty, oracle
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.recorded_target import RecordedTarget
from draftsmith.infer.models.runner import model_runner
from draftsmith.retrieval import PromptLookup


class Scripted(Empty):
    """A drafter that proposes what it was given, and records what it is given."""

    name = "scripted"

    def __init__(self, drafts: Sequence[Draft] = (), features: tuple[str, ...] = ()) -> None:
        self.drafts = list(drafts)
        self.features = features
        self.drafts_unread = False
        self.budgets: list[Budget] = []
        self.feedback: dict[str, list[Feedback]] = {}

    def open(self, rows: Sequence[Row]) -> None:
        self.feedback |= {row.key: [] for row in rows}

    def read(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        for row, one in zip(rows, feedback):
            self.feedback[row.key].append(one)

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget], policy: Any = None) -> list[Draft]:
        self.budgets += budgets
        return [self.drafts.pop(0) if self.drafts else Draft() for _ in rows]

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        for row, one in zip(rows, feedback):
            self.feedback[row.key].append(one)


@pytest.fixture(scope="module")
def model(make_model: Any) -> Any:
    return make_model("llama")


def plain(model: Any, ids: list[int], count: int, settings: Settings | None = None) -> list[int]:
    row = Row("0", list(ids), settings or Settings(), Stops(count))
    return generate(HFTarget(model), Empty(), [row])[0].token_ids


def test_draft_depth_never_exceeds_what_is_left_to_generate(model: Any) -> None:
    drafter = Scripted()
    drafter.drafts_unread = True
    generate(HFTarget(model), drafter, [Row("0", [5, 6], Settings(), Stops(4))], budget=Budget(10, 3))
    assert [budget.depth for budget in drafter.budgets] == [3, 2, 1, 0]
    assert drafter.budgets[-1].nodes == 0


def test_the_end_of_the_context_ends_the_row(make_model: Any, shake: Any) -> None:
    model = make_model("gpt2", n_positions=24)
    drafter = SmallLM(shake(model, 0.02))
    target = HFTarget(model)
    drafter.bind(target)
    (done,) = generate(target, drafter, [Row("0", [5] * 10, Settings(), Stops(100))])
    assert done.stop == "context"
    assert len(done.token_ids) == 14
    assert done.token_ids == plain(model, [5] * 10, 14)


@pytest.mark.parametrize("prompt", [10, 20, 30])
def test_a_row_that_outgrows_the_draft_model_is_named_once_with_the_draft_s_context(
    model: Any, make_model: Any, caplog: pytest.LogCaptureFixture, prompt: int
) -> None:
    target, drafter = HFTarget(model), SmallLM(make_model("llama", max_position_embeddings=20))
    drafter.bind(target)
    (done,) = generate(target, drafter, [Row("long", [5] * prompt, Settings(), Stops(25))])
    assert done.token_ids == plain(model, [5] * prompt, 25)
    (message,) = [record.getMessage() for record in caplog.records if record.name.endswith("lm_drafter")]
    assert message == "row long outgrew the draft model's context of 20: not drafted"


@pytest.mark.parametrize("features", [("last",), ("layer:0", "layer:1", "last")])
def test_features_are_the_states_that_predicted_the_next_token(model: Any, shake: Any, features: Any) -> None:
    """At every prompt position on admit and every committed position on commit, through trees, in order, once."""
    small = SmallLM(shake(model, 0.05), top_k=3, nodes=9, min_confidence=0.0)

    class Reading(Scripted):
        def propose(self, rows: Sequence[Row], budgets: Sequence[Budget], policy: Any = None) -> list[Draft]:
            return small.propose(rows, budgets, policy)

        def open(self, rows: Sequence[Row]) -> None:
            super().open(rows)
            small.open(rows)

        def read(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
            super().read(rows, feedback)
            small.read(rows, feedback)

        def close(self, rows: Sequence[Row]) -> None:
            small.close(rows)

        def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
            super().observe(rows, verdicts, feedback)
            small.observe(rows, verdicts, feedback)

    target, drafter = HFTarget(model), Reading(features=features)
    small.bind(target)
    rows = [Row("a", [3, 9, 4, 17], Settings(), Stops(15)), Row("b", [8], Settings(), Stops(9))]
    done = generate(target, drafter, rows, batch_size=2)
    assert max(trace.accepted for one in done for trace in one.traces) >= 2
    for row in rows:
        with torch.inference_mode():
            states = model(torch.tensor([row.ids]), output_hidden_states=True, use_cache=False).hidden_states
        position = 0
        for feedback in drafter.feedback[row.key]:
            for name in features if feedback.features else ():
                wanted = states[-1 if name == "last" else int(name[6:])][0]
                lent = feedback.features[name]
                torch.testing.assert_close(lent, wanted[position : position + len(lent)], rtol=0, atol=1e-9)
            count = len(next(iter(feedback.features.values()))) if feedback.features else 0
            assert feedback.start == position
            position += count
        assert position == len(row.ids) - 1


def check_features_of_chunks_and_turns(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt and a turn of several chunks, a short turn, and a row that decodes beside them: each position once."""
    monkeypatch.setattr(model_runner, "PREFILL_CHUNK", 5)  # a chunk of the engine's is several of the model's
    target, drafter = HFTarget(model), Scripted(features=("layer:1", "last"))
    turned = Row("a", [3 + i % 50 for i in range(30)], Settings(), Stops(4))
    other = Row("b", [8, 9] * 10, Settings(), Stops(60))
    engine = Engine(target, drafter, batch_size=2, budget=Budget(16, 8), chunk=8)
    engine.add(turned, keep=True)
    engine.add(other)
    for turn in ([7 + i % 40 for i in range(41)], [5, 6, 7, 8, 9], []):
        while not turned.stop:
            engine.step()
        engine.resume(turned, turn)
    for row in (turned, other):
        with torch.inference_mode():
            states = model(torch.tensor([row.ids]), output_hidden_states=True, use_cache=False).hidden_states
        position = 0
        for feedback in drafter.feedback[row.key]:
            assert feedback.start == position
            assert feedback.count == len(feedback.features["last"])
            for name, layer in (("layer:1", 1), ("last", -1)):
                lent_TD = feedback.features[name]
                wanted_TD = states[layer][0, position : position + len(lent_TD)]
                torch.testing.assert_close(lent_TD, wanted_TD, rtol=0, atol=1e-9)
            position += len(feedback.features["last"])
        assert position == target.lm.length(row)
        assert position >= len(row.ids) - 1
    engine.close()


def test_features_come_from_every_chunk_and_every_turn(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check_features_of_chunks_and_turns(model, monkeypatch)


@pytest.mark.parametrize(
    ("name", "sound", "fault"),
    [
        ("_feedback", "max(end - given, 0)", "max(end - given - 1, 0)"),
        ("prefill", "states = dict(zip(chosen, ", "states = dict(zip(chosen[::-1], "),
        ("_feedback", "Feedback(given", "Feedback(again"),
        ("commit", "states_ND[where]", "states_ND[: len(where)] * 0"),
    ],
)
def test_planted_features_of_the_last_chunk_only_are_caught(
    model: Any, monkeypatch: pytest.MonkeyPatch, name: str, sound: str, fault: str
) -> None:
    plant(monkeypatch, HFTarget, name, sound, fault)
    with pytest.raises(AssertionError):
        check_features_of_chunks_and_turns(model, monkeypatch)


def test_a_long_new_turn_is_read_in_chunks_by_drafters_without_features(
    model: Any, shake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_runner, "PREFILL_CHUNK", 5)
    target, drafter = HFTarget(model), SmallLM(shake(model, 0.05))
    drafter.bind(target)
    row = Row("0", [3, 4, 5], Settings(), Stops(8))
    turn = [7 + i % 40 for i in range(41)]
    with Engine(target, drafter, budget=Budget(16, 8), chunk=8) as engine:
        engine.add(row, keep=True)
        for more in (turn, []):
            while not row.stop:
                engine.step()
            first = list(row.ids)
            if more:
                engine.resume(row, more)
    assert row.new_ids == plain(model, first[: row.prompt_tokens], 8)


def test_an_unknown_feature_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="unknown feature 'layer:9'"):
        generate(HFTarget(model), Scripted(features=("layer:9",)), [Row("0", [5])])


def test_a_new_turn_is_pending_like_anything_else(model: Any, shake: Any) -> None:
    target, drafter = HFTarget(model), SmallLM(shake(model, 0.05))
    drafter.bind(target)
    row = Row("0", [3, 4, 5], Settings(), Stops(8))
    with Engine(target, drafter, budget=Budget(16, 8)) as engine:
        engine.add(row, keep=True)
        while not row.stop:
            engine.step()
        first = list(row.ids)
        engine.resume(row, [7, 8, 9] * 10)
        while not row.stop:
            engine.step()
    assert row.new_ids == plain(model, first + [7, 8, 9] * 10, 8)


def test_stops_cut_path_bonus_and_cache_alike(model: Any) -> None:
    answer = plain(model, [3, 4, 5], 12)
    stop_id = answer[5]
    wanted = answer[: answer.index(stop_id) + 1]
    drafter = oracle(num_draft_tokens=8)
    drafter.learn({"0": answer})
    target = HFTarget(model)
    drafter.bind(target)
    row = Row("0", [3, 4, 5], Settings(), Stops(12, frozenset([stop_id, 60])))
    engine = Engine(target, drafter, budget=Budget(16, 16))
    engine.add(row, keep=True)
    (event,) = engine.step()
    assert event.done is not None
    (trace,) = event.done.traces
    assert row.stop == "eos"
    assert row.new_ids == wanted
    assert trace.committed == trace.accepted == len(wanted)
    assert target.lm.length(row) == len(row.ids) - 1


def test_sampled_rows_and_greedy_rows_share_a_batch(model: Any) -> None:
    warm = Settings(temperature=1.1, top_p=0.9, seed=5)
    rows = [Row("0", [3, 4], warm, Stops(10)), Row("1", [3, 4], Settings(), Stops(10))]
    drafter = PromptLookup()
    done = generate(HFTarget(model), drafter, rows, batch_size=2)
    assert done[0].token_ids == plain(model, [3, 4], 10, warm)
    assert done[1].token_ids == plain(model, [3, 4], 10)


def test_a_token_id_outside_the_vocabulary_is_one_clear_line(model: Any) -> None:
    with pytest.raises(ValueError, match="proposed token id 61, outside the target's vocabulary of 61"):
        generate(HFTarget(model), Scripted([Draft().chain([3, 61], "bad")]), [Row("0", [5])])


def test_a_target_that_takes_chains_only_gets_the_likeliest_one(model: Any) -> None:
    target = HFTarget(model)
    target.draft_shape = "chain"
    answer = plain(model, [5], 4)
    tree = Draft()
    tree.outright(ROOT, (answer[0] + 1) % 61, "wrong", 0.1)
    tree.outright(tree.outright(ROOT, answer[0], "right", 0.9), answer[1], "right", 0.9)
    (done,) = generate(target, Scripted([tree]), [Row("0", [5], Settings(), Stops(4))])
    assert done.token_ids == answer
    assert [(trace.nodes, trace.accepted) for trace in done.traces] == [(2, 2), (0, 0)]


def test_a_target_that_takes_no_drafts_refuses_one(model: Any) -> None:
    target = HFTarget(model)
    target.draft_shape = "none"
    with pytest.raises(ValueError, match="no drafts"):
        generate(target, Scripted([Draft().chain([3], "t")]), [Row("0", [5])])


def test_rows_are_released_when_a_step_fails(model: Any) -> None:
    target = HFTarget(model)
    with pytest.raises(ValueError, match="vocabulary"):
        generate(target, Scripted([Draft().chain([99], "bad")]), [Row("0", [5])])
    assert generate(target, Empty(), [Row("0", [5], Settings(), Stops(3))])[0].token_ids == plain(model, [5], 3)


def test_rows_that_a_drafter_does_not_take_leave_the_target_as_it_was(model: Any) -> None:
    target, row = HFTarget(model), Row("0", [5])
    with pytest.raises(ValueError, match="has no plain answer"):
        generate(target, oracle(), [row])
    assert not target.lm.has(row)


def test_traces_count_candidates_sources_and_credit(model: Any) -> None:
    answer = plain(model, [3, 4, 5], 6)
    draft = Draft()
    first = draft.outright(ROOT, answer[0], "left", 0.5)
    draft.outright(first, answer[1], "right", 0.25)
    draft.outright(first, (answer[1] + 1) % 61, "left", 0.1)
    draft.probe(ROOT, (answer[0] + 1) % 61)
    drafter = Scripted([draft])
    drafter.drafts_unread = True
    done = generate(HFTarget(model), drafter, [Row("0", [3, 4, 5], Settings(), Stops(6))])
    trace = done[0].traces[0]
    assert (trace.nodes, trace.trials, trace.depth, trace.accepted, trace.committed) == (3, 3, 2, 2, 3)
    assert trace.nodes_by_source == {"left": 2, "right": 1}
    assert trace.committed_sources == ["left", "right", "target"]
    assert [(t.depth, t.source, t.accepted) for t in trace.tried] == [(1, "left", True), (2, "right", True)]
    assert done[0].token_ids == answer


def test_a_recording_is_replayed_as_it_was() -> None:
    recorded = [4, 5, 6, 7, 4, 5, 6, 9]
    target = RecordedTarget({"0": recorded}, 20)
    (done,) = generate(target, PromptLookup(), [Row("0", [4, 5, 6], Settings(), Stops(len(recorded)))])
    assert done.token_ids == recorded
    assert max(trace.accepted for trace in done.traces) >= 2


def test_a_recording_sampled_at_a_temperature_takes_outright_drafts_only() -> None:
    draft = Draft()
    draft.sampled(ROOT, 4, Group(torch.full((20,), 0.05)), "drawn", 0.05)
    target = RecordedTarget({"0": [4, 5]}, 20, sampled=True)
    with pytest.raises(ValueError, match="outright drafts only"):
        generate(target, Scripted([draft]), [Row("0", [4], Settings(), Stops(2))])
