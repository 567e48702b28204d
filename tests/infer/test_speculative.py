"""`generate` with custom_generate=speculative(...): the same tokens, calls and errors as `generate` without it.

Every lossless test asserts that its own run accepted deep, rejected, and varied: a run that did none of these shows
nothing.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from decoded import assert_tried_hard
from generate_pairs import NEW, batch, both, small
from tiny_folders import Folders
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from draftsmith.infer import speculative
from draftsmith.infer.contract.draft import Draft
from draftsmith.infer.contract.protocols import TargetDistribution, Verdict
from draftsmith.infer.contract.rng import StepRng
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.drafters import SmallLM
from draftsmith.infer.rules.token import rejection
from draftsmith.retrieval import PromptLookup

FAMILIES = ["llama", "qwen3", "gemma2", "gpt2", "mistral"]
PENALISED = {"repetition_penalty": 1.02, "bad_words_ids": [[7], [8, 9]], "min_new_tokens": 12, "suppress_tokens": [11]}


DRAFTERS: dict[str, Callable[[Any], Any]] = {"pld": lambda draft: PromptLookup(), "small": small}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, make_model: Any, shake: Any) -> tuple[Any, Any]:
    model = make_model(request.param, torch.float32)
    return model, shake(model, 0.06)


@pytest.fixture(scope="module")
def llama(make_model: Any, shake: Any) -> tuple[Any, Any]:
    model = make_model("llama", torch.float32)
    return model, shake(model, 0.06)


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("settings", [{}, PENALISED], ids=["greedy", "penalised"])
def test_tokens_equal_those_of_generate_alone_and_in_a_padded_batch(
    pair: tuple[Any, Any], name: str, settings: dict[str, Any]
) -> None:
    call = speculative(DRAFTERS[name](pair[1]))
    seen: list[Generation] = []
    for rows, seed in ((1, 7), (1, 8), (3, 7), (3, 8)):
        plain, drafted = both(pair[0], call, **batch(rows, seed), eos_token_id=None, **settings)
        assert torch.equal(plain, drafted)
        assert len(call.generations) == rows
        seen += call.generations
    assert_tried_hard(seen)


def accepts_all(draft: Draft, distribution: TargetDistribution, rng: StepRng) -> Verdict:
    """A planted fault: the first trial of each node is accepted."""
    path, accepted, node = [], [], -1
    while node in draft.trials:
        accepted.append(draft.trials[node][0])
        node = accepted[-1].node
        path.append(node)
    return Verdict(path, accepted, distribution.draw(node))


def test_a_planted_fault_is_found(llama: tuple[Any, Any]) -> None:
    plain, drafted = both(llama[0], speculative(small(llama[1]), rule=accepts_all), **batch(3), eos_token_id=None)
    assert not torch.equal(plain, drafted)


# Stops: where the text ends, and what rows get that have ended before others.


@pytest.mark.parametrize("name", DRAFTERS)
def test_rows_end_at_their_stop_tokens_and_are_padded(llama: tuple[Any, Any], name: str) -> None:
    inputs = batch(3)
    width = inputs["input_ids"].shape[1]
    free = llama[0].generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    ends = sorted({int(free[0, width + 4]), int(free[1, width + 17])})
    call = speculative(DRAFTERS[name](llama[1]))
    for pad in (0, ends[0]):
        plain, drafted = both(llama[0], call, **inputs, eos_token_id=ends, pad_token_id=pad)
        assert torch.equal(plain, drafted)
    assert len({len(generation.token_ids) for generation in call.generations}) > 1


def test_max_length_counts_the_padding_as_generate_does(llama: tuple[Any, Any]) -> None:
    inputs = batch(3)
    width = inputs["input_ids"].shape[1]
    plain, drafted = both(
        llama[0], speculative(small(llama[1])), **inputs, eos_token_id=None, max_new_tokens=None, max_length=width + 9
    )
    assert drafted.shape == (3, width + 9)
    assert torch.equal(plain, drafted)
    plain, drafted = both(llama[0], speculative("pld"), **inputs, eos_token_id=None, max_new_tokens=1)
    assert torch.equal(plain, drafted)


class Noted(StoppingCriteria):
    """Stops row b at `ends[b]` new tokens and notes every call."""

    def __init__(self, width: int, ends: Sequence[int]) -> None:
        self.width, self.ends = width, torch.tensor(ends)
        self.calls: list[list[list[int]]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        assert scores is None
        self.calls.append(input_ids.tolist())
        return input_ids.shape[1] - self.width >= self.ends


@pytest.mark.parametrize("eos", [None, 2, [20, 21, 22, 23]])
def test_criteria_of_ones_own_see_the_calls_that_generate_makes(llama: tuple[Any, Any], eos: Any) -> None:
    inputs = batch(3)
    width = inputs["input_ids"].shape[1]
    criteria = [Noted(width, (3, 11, 6)), Noted(width, (3, 11, 6))]
    call = speculative(small(llama[1]))
    given = {**inputs, "max_new_tokens": NEW, "do_sample": False, "eos_token_id": eos, "pad_token_id": 0}
    plain = llama[0].generate(**given, stopping_criteria=StoppingCriteriaList([criteria[0]]))
    drafted = llama[0].generate(**given, stopping_criteria=StoppingCriteriaList([criteria[1]]), custom_generate=call)
    assert torch.equal(plain, drafted)
    assert criteria[0].calls == criteria[1].calls
    assert max(trace.accepted for one in call.generations for trace in one.traces) >= 2


def test_max_time_ends_the_text_after_the_token_that_passes_it(llama: tuple[Any, Any]) -> None:
    plain, drafted = both(llama[0], speculative(small(llama[1])), **batch(3), eos_token_id=None, max_time=1e-9)
    assert plain.shape == drafted.shape
    assert torch.equal(plain, drafted)
    criteria = StoppingCriteriaList([MaxTimeCriteria(1e-9)])
    plain, drafted = both(llama[0], speculative("pld"), **batch(1), eos_token_id=None, stopping_criteria=criteria)
    assert torch.equal(plain, drafted)


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append((value.device.type, value.tolist()))

    def end(self) -> None:
        self.seen.append("end")


@pytest.mark.parametrize("rows", [1, 3])
def test_a_streamer_gets_what_generate_gives_it(llama: tuple[Any, Any], rows: int) -> None:
    streamers = [Recorder(), Recorder()]
    given = {**batch(rows), "max_new_tokens": 20, "do_sample": False, "eos_token_id": [20, 21, 22], "pad_token_id": 0}
    llama[0].generate(**given, streamer=streamers[0])
    llama[0].generate(**given, streamer=streamers[1], custom_generate=speculative(small(llama[1])))
    assert streamers[0].seen == streamers[1].seen
    assert streamers[1].seen[-1] == "end"
    assert len(streamers[1].seen) > 4


@pytest.fixture(scope="module")
def on_disk(folders: Folders) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folders.target), AutoTokenizer.from_pretrained(folders.target)


def test_stop_strings_end_the_text_and_need_the_tokenizer(folders: Folders, on_disk: tuple[Any, Any]) -> None:
    model, tokenizer = on_disk
    inputs = tokenizer("the quick brown fox jumps over the quick brown fox", return_tensors="pt")
    width = inputs["input_ids"].shape[1]
    free = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    words = [tokenizer.decode(token) for token in free[0, width:]]
    word = next(one for n, one in enumerate(words) if n > 5 and one.isascii() and one not in "".join(words[:n]))
    given = {**inputs, "max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "stop_strings": [word]}
    plain = model.generate(**given, tokenizer=tokenizer)
    assert width + 6 < plain.shape[1] < width + NEW
    for drafter in ("pld", f"small:{folders.draft}"):
        call = speculative(drafter, tokenizer=tokenizer)
        assert torch.equal(plain, model.generate(**given, custom_generate=call))
    with pytest.raises(ValueError, match=r"stop_strings need the tokenizer here as well: speculative\(\.\.\., tok"):
        model.generate(**given, tokenizer=tokenizer, custom_generate=speculative("pld"))


# Sampling.


def distribution(model: Any, ids: list[int], length: int, **settings: Any) -> dict[tuple[int, ...], float]:
    """The distribution of `length` new tokens, from the scores that `generate` itself computes."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        prompts = torch.tensor([[*ids, *path] for path in found])
        made = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=1, do_sample=True,
            output_scores=True, return_dict_in_generate=True, **settings,
        )  # fmt: skip
        probs_BV = torch.softmax(made.scores[0].double(), -1).tolist()
        found = {
            (*path, token): weight * prob
            for (path, weight), probs_V in zip(found.items(), probs_BV, strict=True)
            for token, prob in enumerate(probs_V)
            if prob > 0
        }
    return found


def misfit(model: Any, call: Any, settings: dict[str, Any]) -> tuple[float, list[Generation]]:
    """By how many standard deviations chi-square of 2,000 sampled texts exceeds its mean, and their rows."""
    ids, length, rows, calls = [2, 1, 4, 2, 1], 4, 400, 5  # the first token comes before the first draft
    wanted = distribution(model, ids, length, **settings)
    padded = torch.tensor([[0, *ids]] * rows)
    mask = torch.tensor([[0] + [1] * len(ids)] * rows)
    given = {"attention_mask": mask, "max_new_tokens": length, "do_sample": True, **settings}
    counts: Counter[tuple[int, ...]] = Counter()
    seen: list[Generation] = []
    torch.manual_seed(5)
    for _ in range(calls):
        made = model.generate(padded, **given, custom_generate=call)
        counts.update(tuple(row) for row in made[:, -length:].tolist())
        seen += call.generations
    assert set(counts) <= set(wanted)
    cells = [(counts[path], prob * rows * calls) for path, prob in wanted.items()]
    often = [cell for cell in cells if cell[1] >= 5]
    rare = [sum(part) for part in zip(*(cell for cell in cells if cell[1] < 5))]
    chi_square = sum((count - expected) ** 2 / expected for count, expected in [*often, *([rare] if rare else [])])
    freedom = len(often) - (not rare)
    assert freedom >= 8
    return (chi_square - freedom) / (2 * freedom) ** 0.5, seen


@pytest.fixture(scope="module")
def five_tokens(make_model: Any, shake: Any) -> tuple[Any, Any]:
    model = make_model("llama", torch.float32, vocab_size=5, pad_token_id=0, bos_token_id=None, eos_token_id=None)
    return model, shake(model, 1.0)


WARM, CUT = {"temperature": 0.9, "top_k": 0}, {"top_k": 3, "top_p": 0.9, "repetition_penalty": 1.3}


@pytest.mark.parametrize(
    ("settings", "sample"), [(one, way) for one in (WARM, CUT) for way in ("likeliest", "drawn", "coupled")]
)
def test_sampled_text_has_generates_distribution(
    five_tokens: tuple[Any, Any], settings: dict[str, Any], sample: Any
) -> None:
    model, draft = five_tokens
    call = speculative(SmallLM(draft, num_draft_tokens=2, top_k=2, nodes=4, sample=sample))
    deviations, seen = misfit(model, call, settings)
    assert deviations < 4
    traces = [trace for one in seen for trace in one.traces]
    assert max(trace.accepted for trace in traces) == 2
    assert any(not tried.accepted for trace in traces for tried in trace.tried)


def forgets_the_residual(draft: Draft, distribution: TargetDistribution, rng: StepRng) -> Verdict:
    """A planted fault: after a rejection the token is drawn from the target's distribution, not from what is left."""
    verdict = rejection(draft, distribution, rng)
    node = verdict.path[-1] if verdict.path else -1
    verdict.next_token = distribution.draw(node)
    return verdict


def test_the_sampling_test_finds_a_planted_fault(five_tokens: tuple[Any, Any]) -> None:
    model, draft = five_tokens
    sampled = SmallLM(draft, num_draft_tokens=2, top_k=2, nodes=4, peaked=1.0, sample="drawn")
    deviations, _ = misfit(model, speculative(sampled, rule=forgets_the_residual), WARM)
    assert deviations > 6


def test_a_sampled_row_follows_torchs_seed_and_rows_differ(llama: tuple[Any, Any]) -> None:
    call = speculative("pld")
    prompt = batch(1)["input_ids"].expand(3, -1)
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(llama[0].generate(prompt, max_new_tokens=30, do_sample=True, top_k=0, custom_generate=call))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert len({tuple(row) for row in made[0].tolist()}) == 3


def test_a_generation_config_of_ones_own_is_honoured(llama: tuple[Any, Any]) -> None:
    config = GenerationConfig(max_new_tokens=12, repetition_penalty=1.3, eos_token_id=None, pad_token_id=0)
    call = speculative("pld")
    plain = llama[0].generate(**batch(3), generation_config=config)
    assert torch.equal(plain, llama[0].generate(**batch(3), generation_config=config, custom_generate=call))


@pytest.mark.gpu
def test_a_model_on_a_gpu_takes_inputs_from_the_gpu_and_from_the_cpu(llama: tuple[Any, Any]) -> None:
    model = copy.deepcopy(llama[0]).to("cuda", torch.float64)
    call = speculative(small(copy.deepcopy(llama[1]).double()))
    for device, rows in product(("cuda", "cpu"), (1, 3)):
        inputs = {name: value.to(device) for name, value in batch(rows).items()}
        plain, drafted = both(model, call, **inputs, **PENALISED)
        assert plain.device == drafted.device
        assert torch.equal(plain, drafted)
