"""What is noted of a drafter along recorded answers: every candidate that was up for acceptance, and no other."""

import pytest

from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.row import Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.measure.calibrate.answers import Answered, answer_prompts
from draftsmith.infer.measure.calibrate.replay import listen
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.load import load_target
from draftsmith.infer.models.recorded_target import RecordedTarget
from draftsmith.infer.text.record import Record
from draftsmith.infer.text.templates import find_template
from draftsmith.retrieval import PromptLookup


class Scripted:
    """Proposes 7 (sure) and 8 (less so) below the prefix, and the same again below 7."""

    name, features = "scripted", ()
    forward_seconds, bytes_moved, origin = 0.0, 0, ""

    def pass_timers(self):
        return {}

    def bind(self, target):
        pass

    def open(self, rows, feedback):
        pass

    def close(self, rows):
        pass

    def observe(self, rows, verdicts, feedback):
        pass

    def propose(self, rows, budgets):
        drafts = []
        for budget in budgets:
            draft = Draft()
            if budget.depth:
                seven = draft.outright(ROOT, 7, "a", 0.9)
                draft.outright(ROOT, 8, "b", 0.4)
                if budget.depth > 1:
                    draft.outright(seven, 7, "a", 0.8)
                    draft.outright(seven, 8, "b", 0.3)
            drafts.append(draft)
        return drafts


def test_candidates_at_visited_nodes_are_noted_with_their_fate():
    """7 7 9: all of the first step's nodes are visited. 8 5: those below 7 are not. 5: the last token, not drafted."""
    answers = [Answered(4, "x", [1], [7, 7, 9, 8, 5, 5])]
    target = RecordedTarget({"x": answers[0].answer}, 20)
    found = listen(Scripted(), target, answers, Settings(), Stops(6))
    assert set(found) == {"a", "b"}
    assert list(zip(found["a"].raw_N, found["a"].accepted_N)) == [(0.9, True), (0.8, True), (0.9, False)]
    assert list(zip(found["b"].raw_N, found["b"].accepted_N)) == [(0.4, False), (0.3, False), (0.4, True)]
    assert found["a"].rank_N.tolist() == [0, 0, 0]
    assert found["b"].rank_N.tolist() == [1, 1, 1]
    assert set(found["a"].prompt_N) == {4}


def test_nothing_behind_a_stop_is_noted(make_model):
    """The target goes on behind its stop token; what is drafted there was never up for acceptance."""
    target = HFTarget(make_model("llama"))
    answers = [Answered(0, "x", [1, 2], [])]
    told = listen(_Reads(), target, answers, Settings(), Stops(6, frozenset(range(61))))
    assert sum(map(len, told.values())) == 2


class _Reads(Scripted):
    features = ("last",)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_drafter_that_reads_states_is_judged_by_the_target_and_hears_the_same(folders, temperature):
    target = load_target(folders.target)
    settings, stops = Settings(temperature=temperature, seed=1), Stops(40)
    records = [Record(id=str(i), turns=[text]) for i, text in enumerate(["the dog, the dog, the dog", "what? what?"])]
    answers = answer_prompts(target, records, find_template("chat", target.tokenizer), settings, stops)

    class Reads(PromptLookup):
        features = ("last",)

    (recorded,), (live,) = (
        listen(drafter, target, answers, settings, stops).values() for drafter in (PromptLookup(), Reads())
    )
    assert len(recorded) > 20
    for name in ("prompt_N", "rank_N", "raw_N", "accepted_N"):
        assert (getattr(recorded, name) == getattr(live, name)).all(), name
