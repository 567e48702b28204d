"""The judge of differences: rounding is a tie, anything else is a bug."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_folders import tiny_llama

from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.measure.bench import Measured, Outcome, Turn
from draftsmith.infer.measure.runners import Question
from draftsmith.infer.measure.ties import TieJudge, name_ties
from draftsmith.infer.models.hf_target import HFTarget

PROMPT = [40, 41, 42, 43, 44]
AT = 12


def exact_logits(model, answer: list[int]) -> torch.Tensor:
    """[V] in float32, behind the prompt and the part of `answer` before AT."""
    exact = tiny_llama()
    exact.load_state_dict(model.state_dict())
    with torch.inference_mode():
        return exact(torch.tensor([PROMPT + answer[:AT]])).logits[0, -1]


def answer_of(model) -> list[int]:
    drafter = Empty()
    return generate(HFTarget(model), drafter, [Row("0", list(PROMPT), Settings(), Stops(24))])[0].token_ids


@pytest.fixture(scope="module")
def twins():
    """A bfloat16 model, its answer, and a token whose head differs from that of answer[AT] by one bit of one weight."""
    model = tiny_llama().to(torch.bfloat16)
    answer = answer_of(model)
    assert len(set(answer[:AT])) >= 4
    token = answer[AT]
    twin = next(other for other in range(10, 300) if other not in answer and other not in PROMPT)
    with torch.no_grad():
        head_VD = model.lm_head.weight
        head_VD[twin] = head_VD[token]
        head_VD[twin, 0] *= 1 + 2**-7
        # The lower id wins where both are equal; the answer shall go on being said.
        if twin < token:
            head_VD[token, 0], head_VD[twin, 0] = float(head_VD[twin, 0]), float(head_VD[token, 0])
    return model, answer, [*answer[:AT], twin, *answer[AT + 1 :]]


def test_what_rounding_decides_is_a_tie(twins):
    model, answer, other = twins
    judge = TieJudge(model)
    found = judge.judge(PROMPT, answer, other)
    assert found.index == AT
    assert found.tie
    assert 0 < found.gap <= 2 * found.error


def test_the_same_difference_is_a_bug_where_rounding_is_finer(twins):
    model, answer, other = twins
    found = TieJudge(copy.deepcopy(model).float()).judge(PROMPT, answer, other)
    assert not found.tie
    assert found.gap > 2 * found.error


def test_a_planted_wrong_token_is_no_tie(twins):
    model, answer, _ = twins
    exact_V = exact_logits(model, answer)
    judge = TieJudge(model)
    for rank in (5, 50, 299):
        wrong = int(exact_V.argsort(descending=True)[rank])
        found = judge.judge(PROMPT, answer, [*answer[:AT], wrong])
        assert (found.index, found.tie) == (AT, False)
        assert found.gap == pytest.approx(float(exact_V[answer[AT]] - exact_V[wrong]), abs=1e-4)


def test_an_answer_that_ended_early_is_no_tie_and_equal_ones_are_no_difference(twins):
    model, answer, _ = twins
    judge = TieJudge(model)
    for base, other in ((answer, answer[:AT]), (answer[:AT], answer)):
        found = judge.judge(PROMPT, base, other)
        assert (found.index, found.tie, found.gap) == (AT, False, float("inf"))
    assert judge.judge(PROMPT, answer, list(answer)) is None


def test_penalties_and_bans_move_the_logits_that_are_compared(twins):
    model, answer, other = twins
    exact_V = exact_logits(model, answer)
    seen, unseen = PROMPT[0], other[AT]
    penalised = float(exact_V[seen] / 3 if exact_V[seen] > 0 else exact_V[seen] * 3)
    found = TieJudge(model, Settings(repetition_penalty=3.0)).judge(PROMPT, answer, [*answer[:AT], seen])
    base = float(exact_V[answer[AT]])
    if answer[AT] in PROMPT + answer[:AT]:
        base = base / 3 if base > 0 else base * 3
    assert found.gap == pytest.approx(abs(base - penalised), abs=1e-4)
    banned = TieJudge(model, Settings(suppress_tokens=(unseen,))).judge(PROMPT, answer, other)
    assert (banned.tie, banned.gap) == (False, float("inf"))
    assert banned.error < float("inf")


def test_every_difference_of_the_results_is_named_with_the_prompt_of_its_turn(twins):
    model, answer, other = twins
    wrong = [*answer[:AT], (answer[AT] + 1) % 300 if (answer[AT] + 1) % 300 != other[AT] else 7]

    def outcome(*turns: list[int]) -> list[Outcome]:
        return [Outcome([Turn(str(ids), Generation("r", ids, "", len(PROMPT)), 1.0) for ids in turns])]

    question = Question(9, "qa", ("one", "two"))
    outcomes = {"plain": outcome([4], answer), "near": outcome([4], other), "far": outcome([4], wrong)}
    measured = Measured([question], "plain", 1, 0, 1, {name: {9: found} for name, found in outcomes.items()})
    differences = {name: [{"question_id": 9, "repeat": 0, "turn": 1}] for name in ("near", "far")}
    results = {"drafters": {name: {"differences": differences.get(name, [])} for name in outcomes}}
    asked = []

    def encode(messages):
        asked.append([message["content"] for message in messages])
        return PROMPT

    name_ties(results, measured, encode, TieJudge(model))
    assert asked == [["one", "[4]", "two"]] * 2
    assert {name: figures["ties"] for name, figures in results["drafters"].items()} == {"plain": 0, "near": 1, "far": 0}
    assert results["drafters"]["near"]["differences"][0]["tie"] is True
    assert results["drafters"]["far"]["differences"][0]["tie"] is False
