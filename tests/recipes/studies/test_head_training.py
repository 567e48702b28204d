"""A small study of heads that stops and resumes."""

import json

import pytest

from draftsmith.recipes.studies.head_training import PAIRS, WAYS, head_training


@pytest.mark.slow
def test_the_study_trains_and_measures_every_draft_once_and_resumes(target_folder, chats, tmp_path):
    out = tmp_path / "study"
    options = {
        "target": str(target_folder), "data": [str(chats)], "questions": [str(chats)], "out": str(out), "seconds": 0.01,
        "draft_vocab": 64, "small_layers": 1, "seeds": [0], "max_new_tokens": 6, "max_length": 96, "batch_size": 2,
        "cache": str(tmp_path / "cache"),
    }  # fmt: skip
    results = head_training(**options)
    names = {"eagle", "eagle-1", "medusa", "hydra", "small"}
    assert set(results["runs"]) == names
    assert set(results["steps"]) == names
    assert len(results["ratios"]) == len(PAIRS) * len(WAYS)
    for name in names:
        assert set(results["runs"][name]) == set(WAYS)
        facts = json.loads((out / "runs" / f"{name}-0" / "run.json").read_text())
        assert facts["state"] == "finished"
        assert facts["max_steps"] == results["steps"][name]
    assert json.loads((out / "runs" / "eagle-0" / "run.json").read_text())["unrolls"] == [0, 1, 2]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    (out / "measured" / "hydra-0.json").unlink()
    assert head_training(**options)["runs"].keys() == results["runs"].keys()
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert {path for path in after if before.get(path) != after[path]} == {out / "measured" / "hydra-0.json"}
    speeds = head_training(**options, speed=True)
    assert set(speeds) == {"0.0", "0.8"}
