"""Curves fitted to half of the prompts and judged by the other half; what is written where."""

import inspect
import json
import time

import numpy as np
import pytest
import torch

from draftsmith.infer.contract.protocols import Budget
from draftsmith.infer.contract.row import Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.costs.calibration import Calibration, calibration_path, find_calibration, find_costs
from draftsmith.infer.costs.calibrator import Calibrator
from draftsmith.infer.costs.identity import TargetIdentity, machine
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.drafters.mixed.mixed import Mixed
from draftsmith.infer.drafters.sd2 import SD2
from draftsmith.infer.drafters.small_lm import SmallLM
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.measure.calibrate import costs as costs_module
from draftsmith.infer.measure.calibrate.answers import Answered, answer_prompts
from draftsmith.infer.measure.calibrate.costs import measure_costs
from draftsmith.infer.measure.calibrate.fit import (
    Calibrated,
    calibrate,
    check_homes,
    cover,
    fit_curves,
    halves,
    save,
    score,
)
from draftsmith.infer.measure.calibrate.observations import ExitProbabilities, Observations
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.text.record import Record
from draftsmith.infer.text.templates import find_template
from draftsmith.retrieval import PromptLookup


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "cache"))


def source(distribution, positions=1500, prompts=30, seed=0):
    """A source of two candidates a position, the likelier one accepted under `distribution` of its confidence."""
    generator = np.random.default_rng(seed)
    raw = generator.uniform(0.3, 1.0, positions)
    hit = generator.uniform(size=positions) < distribution(raw)
    second = ~hit & (generator.uniform(size=positions) < 0.3)
    return Observations(
        np.repeat(np.arange(positions) % prompts, 2),
        np.tile([0, 1], positions),
        np.stack([raw, 1 - raw], 1).ravel(),
        np.stack([hit, second], 1).ravel(),
    )


def answers(count):
    return [Answered(number, f"{number}/0", [1], [2]) for number in range(count)]


def test_half_of_the_prompts_are_fitted_to_and_the_same_half_each_time():
    assert halves(answers(9), 0) == halves(answers(9), 0)
    assert len(halves(answers(9), 0)) == 5
    assert len({tuple(sorted(halves(answers(9), seed))) for seed in range(8)}) > 3
    with pytest.raises(ValueError, match="has 1 answered"):
        halves([*answers(1), *answers(1)], 0)


@pytest.mark.parametrize("distribution", [lambda raw: raw**3, lambda raw: 0.9 + 0 * raw], ids=["over", "under"])
def test_a_source_that_is_wrong_about_itself_is_put_right_on_prompts_that_were_not_fitted_to(distribution):
    seen = source(distribution)
    mine = np.isin(seen.prompt_N, list(halves(answers(30), 0)))
    curves, method = fit_curves("s", seen.where(mine))
    found = score("s", curves, seen.where(~mine))
    assert (method, set(curves)) == ("isotonic", {"s", "s#1", "s#2"})
    assert found["observations"] == int((~mine).sum())
    assert found["first_ece_before"] > 0.15
    assert found["first_ece_after"] < 0.3 * found["first_ece_before"]
    assert found["ece_after"] < 0.5 * found["ece_before"]


def test_one_curve_cannot_tell_a_likeliest_candidate_from_a_second_one_and_the_ranks_own_can():
    seen = source(lambda raw: 0.9 + 0 * raw, 4000)
    mine = np.isin(seen.prompt_N, list(halves(answers(30), 0)))
    curves, _ = fit_curves("s", seen.where(mine))
    found = score("s", curves, seen.where(~mine))
    assert found["first_ece_after"] < 0.2 * found["first_ece_one_curve"]
    assert curves["s#1"](0.5) > 0.8
    assert curves["s#2"](0.5) < 0.1


def test_few_observations_are_fitted_by_two_numbers():
    seen = source(lambda raw: raw**3, 60)
    mine = np.isin(seen.prompt_N, list(halves(answers(30), 0)))
    curves, method = fit_curves("s", seen.where(mine))
    found = score("s", curves, seen.where(~mine))
    assert (method, set(curves)) == ("logistic", {"s", "s#1", "s#2"})
    assert found["first_ece_after"] < 0.6 * found["first_ece_before"]


def test_a_source_that_knows_itself_is_left_alone():
    seen = source(lambda raw: raw, 4000)
    curves, _ = fit_curves("s", seen)
    assert curves["s#1"].many([0.4, 0.6, 0.9]) == pytest.approx([0.4, 0.6, 0.9], abs=0.08)


def test_a_source_without_a_word_on_the_prompts_to_fit_to_is_refused():
    empty = source(lambda raw: raw).where(np.zeros(3000, bool))
    with pytest.raises(ValueError, match="rest proposed nothing"):
        fit_curves("rest", empty)


def test_cover_tells_what_a_deeper_exit_s_top_k_holds():
    """Exit 1 is sure where exit 2 is right at once, and unsure where exit 2 has the token at rank 3."""
    count = 4000
    sure = np.arange(count) % 2 == 0
    prompts = np.arange(count) // 2 % 40
    probs = np.zeros((count, 8))
    probs[:, 0] = np.where(sure, 0.9, 0.2)
    readings = {
        1: ExitProbabilities(prompts, probs, np.where(sure, 0, 8), probs[:, 0]),
        2: ExitProbabilities(prompts, probs, np.where(sure, 0, 3), probs[:, 0]),
    }
    curves, errors = cover(readings, set(range(20)))
    assert set(curves) == {f"{e}>{d}@{k}" for e, d in ((1, 1), (1, 2), (2, 2)) for k in (1, 2, 4, 8)} == set(errors)
    rounded = {key: [round(p) for p in curves[key].many([0.2, 0.9])] for key in curves}
    assert rounded["1>1@8"] == [0, 1]
    assert rounded["1>2@1"] == rounded["1>2@2"] == [0, 1]
    assert rounded["1>2@4"] == rounded["1>2@8"] == [1, 1]
    assert max(errors.values()) < 0.01


def found_for(target, home, sources, passes=None):
    curve = Calibrator((0.1, 0.9), (0.2, 0.6))
    calibration = Calibration(target.fingerprint(), dict.fromkeys(sources, curve))
    weight = next(target.model.parameters())
    whose = machine(weight.device, weight.dtype), TargetIdentity.of("t", target)
    costs = None if passes is None else Costs({name: PassCost([1], [2.0]) for name in passes}, 0.0, *whose)
    return Calibrated(str(home), calibration, {}, {}, costs=costs)


def test_a_second_target_adds_a_file_and_touches_nothing(tmp_path, make_model):
    first, second = (HFTarget(make_model("llama", seed=seed)) for seed in (0, 1))
    save({"small": found_for(first, tmp_path, ["small"])}, first)
    path = calibration_path(tmp_path, first.fingerprint())
    before = path.read_bytes()
    save({"small": found_for(second, tmp_path, ["small", "sd2:1"])}, second)
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 2
    assert set(find_calibration(tmp_path, second).at(0.0).curves) == {"small", "sd2:1"}


def test_drafters_of_one_folder_share_its_files_and_older_sources_stay(tmp_path, make_model):
    target = HFTarget(make_model("llama"))
    save({"old": found_for(target, tmp_path, ["sd2:3"])}, target)
    both = {
        "small": found_for(target, tmp_path, ["small"], ["target", "small"]),
        "sd2": found_for(target, tmp_path, ["sd2:1"], ["target", "sd2:1"]),
    }
    files = save(both, target)
    assert files["small"] == files["sd2"]
    assert set(find_calibration(tmp_path, target).at(0.0).curves) == {"sd2:3", "small", "sd2:1"}
    assert set(find_costs(tmp_path, target).passes) == {"target", "small", "sd2:1"}


def test_what_could_not_be_joined_is_refused_before_anything_is_measured(tmp_path, make_model):
    target = HFTarget(make_model("llama"))
    drafter = PromptLookup()
    drafter.origin = str(tmp_path)
    check_homes({"pld": drafter}, target)
    path = calibration_path(tmp_path, target.fingerprint())
    path.parent.mkdir()
    path.write_text(json.dumps({"kind": "calibration", "format": 99}))
    with pytest.raises(ValueError, match="has format 99"):
        check_homes({"pld": drafter}, target)


def test_costs_hold_the_target_s_passes_and_those_that_a_drafter_lends(make_model):
    target = HFTarget(make_model("llama", dtype=torch.float32))
    drafters = {"draft": SmallLM(make_model("llama", dtype=torch.float32, num_hidden_layers=1)), "pld": PromptLookup()}
    for drafter in drafters.values():
        drafter.bind(target)
    asked = [Answered(0, "0/0", [5, 9, 2], [7, 8])]
    found = measure_costs(target, drafters, asked, seconds=60)
    assert {label: set(costs.passes) for label, (costs, _) in found.items()} == {
        "draft": {"target", "small"},
        "pld": {"target"},
    }
    costs, errors = found["draft"]
    assert set(errors) == {"target", "small"}
    assert 0 < costs.of("small").even(1, 1, 64) < costs.of("target").even(4, 64, 64)
    assert costs.overhead > 0
    assert costs.machine["dtype"] == "float32"


def test_what_is_done_around_each_pass_of_a_draft_counts_and_asking_alone_runs_none(make_model, monkeypatch):
    """Twenty milliseconds per pass that no timer of passes sees."""
    target = HFTarget(make_model("llama", dtype=torch.float32))
    drafter = SmallLM(make_model("llama", dtype=torch.float32, num_hidden_layers=1), num_draft_tokens=6)
    drafter.bind(target)
    own = drafter.best

    def slow(*given):
        time.sleep(0.02)
        return own(*given)

    monkeypatch.setattr(drafter, "best", slow)
    asked = [Answered(0, "0/0", [5, 9, 2], [7, 8])]
    passes = {name: PassCost((1, 201), (0.01, 0.02)) for name in ("target", "small")}
    costs = Costs(passes, 0.001)
    assert 0.018 < costs_module.around(target, drafter, asked, costs) < 0.04
    policy = costs_module._CountsPasses(costs_module._always_pays(costs))
    traces = costs_module._traces(Engine(target, drafter, policy=policy, budget=Budget(64, 3)), asked)
    depths = [trace.depth for trace in traces if trace.nodes]
    assert len(policy.passes) == len(depths) > 10
    assert all(depth <= passes <= 3 for depth, passes in zip(depths, policy.passes))
    assert 0 < costs_module.asking(target, drafter, asked, costs_module._never_pays(costs)) < 0.018


def test_a_draft_is_timed_within_its_own_context(make_model, monkeypatch):
    """A draft with a shorter context than the target's was timed at the target's."""
    target = HFTarget(make_model("gpt2", torch.float32, n_positions=1024))
    short = make_model("gpt2", torch.float32, n_positions=128)
    drafters = {"small": SmallLM(short), "sd2": SD2(short, [1, 2])}
    timed = {}

    def note(jobs, seconds):
        timed.update({name: max(shape.context for shape in shapes) for name, (_, shapes) in jobs.items()})
        beyond = [
            shape for timer, shapes in jobs.values() for shape in shapes
            if shape.context + shape.tokens > timer.max_positions
        ]  # fmt: skip
        assert not beyond
        raise KeyboardInterrupt

    monkeypatch.setattr(costs_module, "measure_together", note)
    with pytest.raises(KeyboardInterrupt):
        measure_costs(target, drafters, [], seconds=60)
    assert timed == {"/target": 512, "small/small": 64, "sd2/sd2:1": 64, "sd2/sd2:2": 64}


def trained(make, text_ids, steps, seed):
    """A model after `steps` steps on windows of the text."""
    model = make(seed).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(0, len(text_ids) - 64, (16,), generator=generator).tolist()
        batch = torch.stack([text_ids[start : start + 64] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


@pytest.mark.slow
def test_calibration_errors_fall_on_a_trained_pair(make_model, folders):
    """A target of two layers and a draft of one, both trained on Python's own text."""
    text = inspect.getsource(inspect)
    tokenizer = folders.tokenizer
    ids = torch.tensor(tokenizer(text)["input_ids"])

    def make(layers):
        return lambda seed: make_model(
            "llama", dtype=torch.float32, seed=seed, num_hidden_layers=layers, vocab_size=len(tokenizer),
            initializer_range=0.02, max_position_embeddings=256,
        )  # fmt: skip

    target = HFTarget(trained(make(2), ids, 400, 0), tokenizer)
    drafter = SmallLM(trained(make(1), ids, 400, 1))
    drafter.reader.tokenizer = tokenizer
    drafter.bind(target)
    lines = [line for line in text.splitlines() if len(line) > 40][::20][:40]
    settings, stops = Settings(temperature=0.7), Stops(48)
    records = [Record(id=str(i), turns=[line]) for i, line in enumerate(lines)]
    asked = answer_prompts(target, records, find_template("plain", tokenizer), settings, stops)
    found = calibrate(drafter, target, asked, halves(asked, 0), settings, stops)
    scores = found.scores["small"]
    assert scores["ece_after"] < scores["ece_before"]
    assert scores["first_ece_after"] < scores["first_ece_before"]
    assert set(found.covered_error) == {f"1>1@{k}" for k in (1, 2, 4, 8)}


def test_a_mix_is_not_calibrated_itself(make_model):
    mix = Mixed([PromptLookup(), Empty()])
    with pytest.raises(ValueError, match=r"both is a mix, .* calibrate its drafters \(pld\+empty\)"):
        check_homes({"both": mix}, HFTarget(make_model("llama")))
