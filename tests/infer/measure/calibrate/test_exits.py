"""What is read in one pass over an answer is what drafting along it would have met."""

import numpy as np
import pytest
import torch

from draftsmith.infer.contract.row import Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.drafters.small_lm import SmallLM
from draftsmith.infer.measure.calibrate.answers import Answered
from draftsmith.infer.measure.calibrate.exits import read_exits
from draftsmith.infer.measure.calibrate.replay import listen
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.layers import first_layers


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


def test_one_pass_tells_what_listening_to_the_drafter_tells(pair):
    """A drafter that goes one token deep is asked at every step: its candidates are the first ones of the reading."""
    target, draft, answers = pair
    drafter, judge = SmallLM(draft, num_draft_tokens=1, top_k=3, min_confidence=0.0), HFTarget(target)
    drafter.bind(judge)
    heard = listen(drafter, judge, answers, Settings(), Stops(20))["small"]
    read = read_exits(draft, [3], answers, 61)[3].observations()
    known = {
        (prompt, rank, round(raw, 6), accepted)
        for prompt, rank, raw, accepted in zip(read.prompt_N, read.rank_N, read.raw_N, read.accepted_N)
    }
    noted = {
        (prompt, rank, round(raw, 6), accepted)
        for prompt, rank, raw, accepted in zip(heard.prompt_N, heard.rank_N, heard.raw_N, heard.accepted_N)
    }
    assert len(noted) > 40
    assert noted <= known
    assert heard.accepted_N.any()
    assert not heard.accepted_N[heard.rank_N == 0].all()


def test_candidates_of_a_position_are_told_by_rank_and_at_most_one_is_accepted(pair):
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
