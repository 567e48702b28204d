"""The judge of differences: rounding is a tie, anything else is a bug."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_folders import tiny_llama

from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.drafters.controls import Empty, adversary
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.measure.bench import Measured, Outcome, Turn
from draftsmith.infer.measure.runners import LoopRunner, Prompt, Question
from draftsmith.infer.measure.ties import TieJudge, judgement, name_ties
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.runner import pass_inputs
from draftsmith.infer.models.runner.masks import SlotRun

PROMPT = [40, 41, 42, 43, 44]
AT = 12
RIGHT = pass_inputs.pieces


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


def logits(*values: float) -> torch.Tensor:
    return torch.tensor([*values, 0.0, 0.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("gap", "own_gap", "elsewhere", "tie"),
    [
        (0.15, 0.05, 0.0, True),
        (0.19, 0.02, 0.0, True),
        (0.3, 0.2, 0.0, False),  # a gap of 3 times the error
        (0.21, 0.1, 0.0, False),
        (0.15, 0.36, 0.0, False),  # the engine's error of the gap is larger
        (0.15, -0.1, 0.0, False),
        (0.15, 0.05, 0.5, False),  # the engine is wrong about the other tokens
    ],
)
def test_a_tie_is_at_most_twice_the_rounding_error(gap, own_gap, elsewhere, tie):
    exact_V, way_V, own_V = logits(1.0, 1.0 - gap), logits(1.0, 1.0 - gap + 0.1), logits(1.0, 1.0 - own_gap)
    own_V[2] += elsewhere
    found = judgement(4, (0, 1), exact_V, [exact_V, way_V], [exact_V, own_V], 0.0)
    assert (found.tie, found.gap, found.error) == (tie, pytest.approx(gap), pytest.approx(0.1))
    assert found.own_error == pytest.approx(abs(gap - own_gap))


def test_the_error_of_other_tokens_explains_nothing():
    exact_V, way_V = logits(1.0, 0.7), logits(1.0, 0.7)
    way_V[2] += 10
    assert not judgement(0, (0, 1), exact_V, [way_V], [], 0.0).tie
    assert judgement(0, (0, 1), exact_V, [way_V], [], 0.2).tie, "the dtype cannot tell the two apart"


def windowed(window: int, spread: float, seed: int):
    """A bfloat16 model whose layers all have a sliding window."""
    from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
             "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=window, initializer_range=spread))
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    return model.eval().to(torch.bfloat16)


def by_the_largest_error_of_any_logit(judge: TieJudge, prompt: list[int], answer: list[int], gap: float) -> bool:
    """The classifier that this one replaces."""
    _, (single_V, *ways) = judge._measure(prompt, answer)
    return gap <= 2 * max(float((way_V - single_V).abs().max()) for way_V in ways)


def judged(model, prompt: list[int], faulty, monkeypatch) -> list[tuple[bool, bool]]:
    """(tie, tie by the largest error) for the differences of plain and drafted answers from plain ones without fault.

    `faulty` replaces the mask's window, in the engine only.
    """
    right = RIGHT
    monkeypatch.setattr(pass_inputs, "pieces", right)  # loading tries the masks out
    target, judge = HFTarget(model), TieJudge(model)
    prompts = [Prompt("0/0", prompt)]
    plain = LoopRunner("plain", target, None, Settings(), Stops(64))
    drafted = LoopRunner("adversary", target, adversary(), Settings(), Stops(64))

    def answer(runner: LoopRunner, near) -> list[int]:
        monkeypatch.setattr(pass_inputs, "pieces", near)
        runner.prepare(prompts)
        return runner.run(prompts)[0].token_ids

    base = answer(plain, right)
    found = []
    for runner in (plain, drafted):
        other = answer(runner, faulty)

        def own(index: int, runner: LoopRunner = runner, other: list[int] = other) -> list[torch.Tensor]:
            seen = []
            for side, near, ids in ((plain, right, base), (runner, faulty, other)):
                monkeypatch.setattr(pass_inputs, "pieces", near)
                seen.append(side.logits_again(prompts, {"0/0": ids}, "0/0", index))
            return seen

        one = judge.judge(prompt, base, other, own)
        if one is not None:
            by_any = by_the_largest_error_of_any_logit(judge, prompt, base[: one.index], one.gap)
            found.append((one.tie, by_any))
    return found


def off_by_one(row, chosen, window, right=RIGHT):
    return right(row, chosen, None if window is None else window + 1)


def in_halves(row, chosen, window, right=RIGHT):
    """What is right, read in two parts that are merged: only rounding differs."""
    found = []
    for run in right(row, chosen, window):
        half = run.count // 2
        for start, end in ((0, half), (half, run.count)) if half else ((0, run.count),):
            seen_QK = None if run.seen_QK is None else run.seen_QK[:, start:end]
            found.append(SlotRun(run.start + start, end - start, seen_QK))
    return found


def prompt_of(seed: int) -> list[int]:
    return torch.randint(4, 300, (40,), generator=torch.Generator().manual_seed(seed)).tolist()


# Seeds where reading in halves changes the text.
SEEDS = (0, 1, 4)
# (window, spread of the weights, seed) where the fault changes the text at a token that was nearly a tie.
CASES = [(32, 0.06, 0), (32, 0.06, 4), (32, 0.06, 10), (32, 0.06, 11), (48, 0.05, 4), (48, 0.05, 6)]


def test_a_window_that_is_off_by_one_is_a_bug_in_bfloat16_too(monkeypatch):
    found = [
        one
        for window, spread, seed in CASES
        for one in judged(windowed(window, spread, seed), prompt_of(seed), off_by_one, monkeypatch)
    ]
    assert found, "the fault changes no text"
    assert any(by_any for _, by_any in found), "the largest error of any logit lets these faults pass as ties"
    assert not any(tie for tie, _ in found)


def test_rounding_in_bfloat16_is_a_tie_by_the_engine_s_own_logits_too(monkeypatch):
    found = [one for seed in SEEDS for one in judged(windowed(32, 0.08, seed), prompt_of(seed), in_halves, monkeypatch)]
    assert found, "nothing was rounded differently"
    assert all(tie for tie, _ in found)


@pytest.mark.parametrize("error", [MemoryError("no room for 14 GiB"), RuntimeError("out of memory\nand more")])
def test_a_judge_that_fails_leaves_the_reason_and_what_it_has_judged(error):
    class Judge:
        def judge(self, *words):
            raise error

    question = Question(9, "qa", ("one",))

    def outcome(ids: list[int]) -> list[Outcome]:
        return [Outcome([Turn("", Generation("r", ids, "", len(PROMPT)), 1.0)])]

    outcomes = {"plain": {9: outcome([1, 2])}, "other": {9: outcome([1, 3])}}
    measured = Measured([question], "plain", 1, 0, 1, outcomes)
    difference = {"question_id": 9, "repeat": 0, "turn": 0}
    results = {"drafters": {"plain": {"differences": []}, "other": {"differences": [difference]}}}
    name_ties(results, measured, lambda messages: PROMPT, Judge())
    assert results["not_judged"] == str(error).splitlines()[0]
    assert {name: row["not_judged"] for name, row in results["drafters"].items()} == {"plain": 0, "other": 1}
    assert {row["ties"] for row in results["drafters"].values()} == {0}
    assert "tie" not in difference
