"""Candidates along answers: read in one pass as drafting would meet them, or noted from a drafter in the loop."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.drafters.coupled import Race
from draftsmith.infer.drafters.small_lm import SmallLM
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.measure.calibrate.answers import Answered, answer_prompts
from draftsmith.infer.measure.calibrate.observations import listen, read_exits
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.layers import first_layers
from draftsmith.infer.models.load import load_target
from draftsmith.infer.models.recorded_target import RecordedTarget
from draftsmith.infer.text.record import Record
from draftsmith.infer.text.templates import find_template
from draftsmith.retrieval import PromptLookup


def plain(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture
def pair(make_model, shake):
    """A target, a draft of three layers, and the target's answers to two prompts."""
    target = make_model("llama", num_hidden_layers=3)
    prompts = [[5, 9, 2, 7], [11, 3, 20, 4, 8]]
    answers = [Answered(n, f"{n}/0", prompt, plain(target, prompt, 20)) for n, prompt in enumerate(prompts)]
    return target, shake(target, 0.15), answers


def test_every_exit_is_the_model_that_leaves_there(pair):
    _, draft, answers = pair
    found = read_exits(draft, [1, 2, 3], answers, 61)
    for exit, reading in found.items():
        model, at = first_layers(draft, exit), 0
        for one in answers:
            for i, token in enumerate(one.answer):
                distribution = torch.softmax(model(torch.tensor([one.prompt + one.answer[:i]])).logits[0, -1], -1)
                top = distribution.topk(8)
                assert reading.probs_NK[at] == pytest.approx(top.values.tolist(), abs=1e-6)
                ids = top.indices.tolist()
                assert reading.rank_N[at] == (ids.index(token) if token in ids else 8)
                assert reading.prompt_N[at] == one.number
                at += 1
        assert at == len(reading.rank_N)
    assert len({tuple(reading.rank_N) for reading in found.values()}) == 3


def test_one_pass_finds_what_listening_to_the_drafter_finds(pair):
    """A drafter that goes one token deep is asked at every step: its candidates are the first ones of the reading."""
    target, draft, answers = pair
    drafter, judge = SmallLM(draft, num_draft_tokens=1, top_k=3, min_confidence=0.0), HFTarget(target)
    drafter.bind(judge)
    listened = listen(drafter, judge, answers, Settings(), Stops(20))["small"]
    read = read_exits(draft, [3], answers, 61)[3].observations()
    known = {
        (prompt, rank, round(raw, 6), accepted)
        for prompt, rank, raw, accepted in zip(read.prompt_N, read.rank_N, read.raw_N, read.accepted_N)
    }
    noted = {
        (prompt, rank, round(raw, 6), accepted)
        for prompt, rank, raw, accepted in zip(listened.prompt_N, listened.rank_N, listened.raw_N, listened.accepted_N)
    }
    assert len(noted) > 40
    assert noted <= known
    assert listened.accepted_N.any()
    assert not listened.accepted_N[listened.rank_N == 0].all()


def test_candidates_of_a_position_are_ordered_by_rank_and_at_most_one_is_accepted(pair):
    _, draft, answers = pair
    reading = read_exits(draft, [2], answers, 61)[2]
    seen = reading.observations()
    assert len(seen) == 8 * len(reading.rank_N)
    accepted_N8 = seen.accepted_N.reshape(-1, 8)
    assert (accepted_N8.sum(1) == (reading.rank_N < 8)).all()
    assert (np.diff(seen.raw_N.reshape(-1, 8)) <= 0).all()
    assert (reading.covers(4) == accepted_N8[:, :4].any(1)).all()


def test_text_beyond_the_draft_s_context_is_left_out(pair):
    _, draft, answers = pair
    draft.config.max_position_embeddings = 10
    reading = read_exits(draft, [3], answers, 61)[3]
    assert np.bincount(reading.prompt_N).tolist() == [10 - 3, 10 - 4]
    draft.config.max_position_embeddings = 3
    with pytest.raises(ValueError, match="context of 3"):
        read_exits(draft, [3], answers, 61)


def test_ids_that_the_target_does_not_have_take_no_probability(pair):
    _, draft, answers = pair
    some = [Answered(0, "0/0", one.prompt, [token % 30 for token in one.answer]) for one in answers]
    reading = read_exits(draft, [3], some, 30)[3]
    distribution = torch.softmax(draft(torch.tensor([some[0].prompt])).logits[0, -1, :30], -1)
    assert reading.probs_NK[0] == pytest.approx(distribution.topk(8).values.tolist(), abs=1e-6)


class Scripted(Empty):
    """Proposes 7 (sure) and 8 (less so) below the prefix, and the same again below 7."""

    name = "scripted"

    def propose(self, rows, budgets, policy=None):
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
    found = listen(_Reads(), target, answers, Settings(), Stops(6, frozenset(range(61))))
    assert sum(map(len, found.values())) == 2


class _Reads(Scripted):
    features = ("last",)
    drafts_unread = True


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_drafter_that_reads_states_is_judged_by_the_target_and_sees_the_same(folders, temperature):
    target = load_target(folders.target)
    settings, stops = Settings(temperature=temperature, seed=1), Stops(80)
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


WARM = Settings(temperature=0.8, top_k=20, seed=4)


def test_coupled_candidates_of_a_text_are_those_that_decoding_proposes(pair):
    """One pass over sampled answers finds the candidates that the drafter had while they were drawn."""
    target, draft, answers = pair
    drafter = SmallLM(draft, num_draft_tokens=1, top_k=3, min_confidence=0.0, sample="coupled")
    judge = HFTarget(target)
    drafter.bind(judge)
    rows = [Row(one.key, list(one.prompt), WARM, Stops(20)) for one in answers]
    drawn = [replace(one, answer=made.token_ids) for one, made in zip(answers, generate(judge, Empty(), rows))]
    listened = listen(drafter, judge, drawn, WARM, Stops(20))["small"]
    found = read_exits(draft, [3], drawn, 61, race=Race.of(judge), settings=WARM)[3]
    known = {(n, r, round(raw, 5), hit) for n, r, raw, hit in zip(*columns(found.observations()))}
    noted = {(n, r, round(raw, 5), hit) for n, r, raw, hit in zip(*columns(listened))}
    assert len(noted) > 40
    assert noted <= known
    likeliest = read_exits(draft, [3], drawn, 61)[3]
    assert found.covers(1).mean() > likeliest.covers(1).mean() + 0.15
    other = read_exits(draft, [3], drawn, 61, race=Race.of(judge), settings=replace(WARM, seed=5))[3]
    assert other.covers(1).mean() < found.covers(1).mean() - 0.15
    assert (found.top_N == likeliest.probs_NK[:, 0]).all(), "exits are chosen by the likeliest token's probability"


def columns(seen):
    return seen.prompt_N, seen.rank_N, seen.raw_N, seen.accepted_N
