"""A small study of distillation that stops and resumes."""

import json

from draftsmith.recipes.studies.distillation import Arm, calibrated, study_of
from draftsmith.recipes.studies.study import read_measured
from draftsmith.train.run.config import Machine, Optim, Text, TrainConfig, Watch


def test_a_study_does_what_is_missing_and_nothing_twice(target_folder, chats, tmp_path):
    config = TrainConfig(
        target=str(target_folder), data=[str(chats)], out=str(tmp_path / "study"), num_layers=1,
        text=Text(max_length=96, held_out=0.1, cache=str(tmp_path / "cache")),
        optim=Optim(lr=1e-3, batch_size=2, micro_batch_size=1), machine=Machine("cpu", workers=0),
        watch=Watch(val_every=0, val_packs=2, val_prompts=0),
    )  # fmt: skip
    kl = {"losses": {"forward_kl": 1.0}}
    arms = [
        Arm("sft", None, 0.01, num_layers=1, ways=("greedy", "tree")),
        Arm("kl", kl, 0.01, num_layers=1, ways=("greedy", "sampled", "tree")),
        Arm("again", kl, 0.01, num_layers=1, steps_of="kl", starts_from="kl", ways=("greedy",)),
        Arm("alike", kl, 0.02, num_layers=1, cost_of="kl", ways=("greedy",)),
    ]
    study = study_of(config, arms, [str(chats)], max_new_tokens=4, seeds=(0,))
    study.finish()
    steps = calibrated(config, arms)
    assert steps["again"] == steps["kl"]
    each = json.loads((study.out / "calibration.json").read_text())
    assert set(each) == {"sft", "kl", "again"}
    assert steps["alike"] == max(round(0.02 / each["kl"]), 1)
    facts = json.loads((study.folder("again", 0) / "run.json").read_text())
    assert facts["max_steps"] == steps["kl"]
    assert facts["settings"]["init"] == str(study.folder("kl", 0))
    before = {path: path.stat().st_mtime_ns for path in study.out.rglob("*") if path.is_file()}
    study.measured("kl", 0).unlink()
    study_of(config, arms, [str(chats)], max_new_tokens=4, seeds=(0,)).finish()
    after = {path: path.stat().st_mtime_ns for path in study.out.rglob("*") if path.is_file()}
    assert {path for path in after if before.get(path) != after[path]} == {study.measured("kl", 0)}
    found, distinct = read_measured(study.out)
    assert len(distinct) == 40
    assert set(found["kl", 0]) == {"loss", "greedy", "sampled", "tree"}
    assert all(
        done >= steps for done, steps in zip(found["kl", 0]["tree"]["committed"], found["kl", 0]["tree"]["steps"])
    )
