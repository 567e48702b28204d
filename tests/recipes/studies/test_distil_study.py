"""The study of distillation: its figures from known counts, and a small one that stops and goes on."""

import json

import pytest

from draftsmith.recipes.studies.distil_figures import markdown, summarise
from draftsmith.recipes.studies.distil_study import Arm, Study, calibrated, run_study
from draftsmith.recipes.studies.study_figures import read_found
from draftsmith.train.run.config import TrainConfig
from draftsmith.train.run.settings import Machine, Optim, Text, Watch


def run_of(committed, steps):
    return {"greedy": {"committed": committed, "steps": steps}, "loss": {}}


def test_figures_are_ratios_of_sums_over_prompts_and_the_seeds_that_both_have():
    found = {
        ("kl", 0): run_of([30, 20], [10, 10]), ("kl", 1): run_of([40, 10], [10, 10]),
        ("sft", 0): run_of([20, 10], [10, 10]),
    }  # fmt: skip
    results = summarise(found, [0.9, 0.1], [("kl", "sft"), ("kl", "nobody")])
    assert results["arms"]["kl"]["all"]["greedy"]["accepted_length"] == 2.5
    assert results["arms"]["kl"]["all"]["greedy"]["by_seed"] == [2.5, 2.5]
    (pair,) = results["ratios"]
    assert pair["all"]["greedy"]["ratio"] == pytest.approx(50 / 30)
    low, high = pair["all"]["greedy"]["interval"]
    assert low == pytest.approx(1.5)
    assert high == pytest.approx(2.0)
    assert results["prompts"] == {"all": 2, "not_looping": 1}
    assert pair["not_looping"]["greedy"]["ratio"] == 1.5
    assert "| kl / sft | 1.667 [1.500, 2.000] (1.667) |" in markdown(results)


def test_a_study_does_what_is_missing_and_nothing_twice(target_folder, chats, tmp_path):
    plan = TrainConfig(
        target=str(target_folder), data=[str(chats)], out=str(tmp_path / "study"), num_layers=1,
        text=Text(max_length=96, held_out=0.1, cache=str(tmp_path / "cache")),
        optim=Optim(lr=1e-3, batch_size=2, micro_batch_size=1), machine=Machine("cpu", workers=0),
        watch=Watch(val_every=0, val_packs=2, val_prompts=0),
    )  # fmt: skip
    kl = {"losses": {"forward_kl": 1.0}}
    arms = [
        Arm("sft", None, 0.01, num_layers=1, ways=("greedy", "tree")),
        Arm("kl", kl, 0.01, num_layers=1, ways=("greedy", "sampled", "tree")),
        Arm("again", kl, 0.01, num_layers=1, steps_of="kl", begins_as="kl", ways=("greedy",)),
        Arm("alike", kl, 0.02, num_layers=1, cost_of="kl", ways=("greedy",)),
    ]
    study = Study(plan, arms, [str(chats)], max_new_tokens=4, seeds=(0,))
    run_study(study)
    steps = calibrated(study)
    assert steps["again"] == steps["kl"]
    each = json.loads((study.out / "calibration.json").read_text())
    assert set(each) == {"sft", "kl", "again"}
    assert steps["alike"] == max(round(0.02 / each["kl"]), 1)
    facts = json.loads((study.run("again", 0) / "run.json").read_text())
    assert facts["max_steps"] == steps["kl"]
    assert facts["settings"]["init"] == str(study.run("kl", 0))
    before = {path: path.stat().st_mtime_ns for path in study.out.rglob("*") if path.is_file()}
    study.measured("kl", 0).unlink()
    run_study(study)
    after = {path: path.stat().st_mtime_ns for path in study.out.rglob("*") if path.is_file()}
    assert {path for path in after if before.get(path) != after[path]} == {study.measured("kl", 0)}
    found, distinct = read_found(study.out)
    assert len(distinct) == 40
    assert set(found["kl", 0]) == {"loss", "greedy", "sampled", "tree"}
    assert all(
        done >= steps for done, steps in zip(found["kl", 0]["tree"]["committed"], found["kl", 0]["tree"]["steps"])
    )
