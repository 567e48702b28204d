"""`draftsmith calibrate`: files in their places, one per target; figures; refusals in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from draftsmith.infer.costs.calibration import find_calibration, find_costs
from draftsmith.infer.models.load import load_target

PROMPTS = [
    "what does the fox say to the lazy dog?", "the dog, the dog, the dog", "why?", "how does a fox jump?",
    "say that again", "over the brown dog", "quick, what is that?", "the target says",
]  # fmt: skip
SORTED = """
from draftsmith.infer.drafters import SmallLM

def sorted_draft(model: str):
    drafter = SmallLM(model)
    drafter.exit_sources = {1: "sd2:1", 2: "sd2:2"}
    return drafter
"""


@pytest.fixture
def draft(folders, tmp_path, monkeypatch):
    """A copy of the draft that may be written to."""
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(folders.draft, tmp_path / "draft")


@pytest.fixture
def calibrate(call, rows_file, folders):
    data = rows_file([{"prompt": prompt} for prompt in PROMPTS])

    def calibrate(drafters, *words, target=folders.target):
        return call("calibrate", "--target", target, "--drafters", drafters, "--data", data,
                    "--max_new_tokens", 24, "--seconds", 0, *words)  # fmt: skip

    return calibrate


def test_curves_are_kept_where_the_time_for_costs_is_too_short(calibrate, draft, folders):
    failed = calibrate(f"small:{draft}", "--seconds", 0.001)
    assert failed.code == 2
    assert "give more time (--seconds)" in failed.err
    target = load_target(folders.target)
    assert find_calibration(str(draft), target).at(0.0).curves
    assert find_costs(str(draft), target) is None


def test_curves_and_costs_are_found_again_and_the_plots_are_there(calibrate, draft, folders, tmp_path):
    out = tmp_path / "out"
    printed = calibrate(f"small:{draft},pld", "--out", out, "--seconds", 30)
    assert printed.code == 0, printed.err
    for word in ("isotonic", "by rank", "overhead", str(draft / "calibration")):
        assert word in printed.out
    told = json.loads((out / "results.json").read_text())
    assert told["prompts"] == len(PROMPTS)
    assert 0 < told["tokens"] <= 24 * len(PROMPTS)
    small = told["drafters"]["small"]
    figures = small["sources"]["small"]
    assert figures["observations"] + figures["fitted_to"] == 8 * told["tokens"]
    assert 0 <= figures["ece_after"] <= 1
    assert set(small["passes"]) == {"target", "small"}
    target = load_target(folders.target)
    found, costs = find_calibration(draft, target), find_costs(draft, target)
    assert found is not None
    calibration = found.at(0.0)
    assert calibration is not None
    assert costs is not None
    assert set(calibration.curves) >= {"small", "small#1"}
    assert set(calibration.covered) == {f"2>2@{k}" for k in (1, 2, 4, 8)}
    assert calibration.measured["small"]["ece_after"] == figures["ece_after"]
    assert Path(small["calibration"]).parent == draft / "calibration"
    assert costs.overhead == small["overhead_s"]
    lookup = find_calibration("pld", target)
    assert lookup is not None
    assert "pld" in lookup.at(0.0).curves
    assert {path.name for path in out.iterdir()} == {
        "run.json", "results.json", "reliability-small-small.png", "reliability-pld-pld.png"
    }  # fmt: skip


def test_a_second_target_adds_a_file_and_leaves_the_first(calibrate, draft, folders):
    first = Path(calibrate(f"small:{draft}", "--json").json["drafters"]["small"]["calibration"])
    before = first.read_bytes()
    second = calibrate(f"small:{draft}", "--json", target=folders.same_size_draft).json
    assert Path(second["drafters"]["small"]["calibration"]) != first
    assert "costs" not in second["drafters"]["small"]
    assert first.read_bytes() == before
    assert len(list((draft / "calibration").iterdir())) == 2


def test_every_temperature_asked_for_gets_a_band_and_later_runs_add_theirs(calibrate, draft, folders, tmp_path):
    out = tmp_path / "out"
    told = calibrate(f"small:{draft},pld", "--temperatures", "[0,0.8]", "--json", "--out", out).json
    assert told["temperatures"] == [0.0, 0.8]
    small = told["drafters"]["small"]
    assert small["at"]["0.8"]["sources"]["small"]["first_accepted"] != small["sources"]["small"]["first_accepted"]
    assert {path.name for path in out.iterdir()} >= {
        "reliability-small-small.png", "reliability-small-small-T0.8.png", "reliability-pld-pld-T0.8.png"
    }  # fmt: skip
    calibrate(f"small:{draft}", "--temperature", 1.5)
    target = load_target(folders.target)
    found = find_calibration(draft, target)
    assert {band: one.temperature for band, one in found.bands.items()} == {
        "greedy": 0.0, "(0.6, 0.85] coupled": 0.8, "(1.1, ...) coupled": 1.5
    }  # fmt: skip
    assert len({found.at(t, coupled=True).curves["small"] for t in (0.0, 0.7, 2.0)}) == 3
    assert set(find_calibration("pld", target).bands) == {"greedy", "(0.6, 0.85]"}


def test_the_target_s_own_sampling_temperature_is_calibrated_for_by_default(calibrate, draft, folders, tmp_path):
    target = Path(shutil.copytree(folders.target, tmp_path / "warm"))
    (target / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.6}))
    assert calibrate(f"small:{draft}", "--json", target=target).json["temperatures"] == [0.0, 0.6]
    assert calibrate(f"small:{draft}", "--json", "--temperature", 1, target=target).json["temperatures"] == [1.0]


def test_a_file_without_bands_is_replaced(calibrate, draft, folders):
    path = Path(calibrate(f"small:{draft}", "--json").json["drafters"]["small"]["calibration"])
    path.write_text(json.dumps({"kind": "calibration", "format": 1, "target": "x", "curves": {}, "covered": {}}))
    again = calibrate(f"small:{draft}")
    assert again.code == 0, again.err
    assert json.loads(path.read_text())["format"] == 2


@pytest.fixture
def sorted_spec(draft, tmp_path, monkeypatch):
    """A draft with two exits, as a YAML file names it."""
    (tmp_path / "calibrated_sorted.py").write_text(SORTED)
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = tmp_path / "sorted.yaml"
    entry = f"class_path: calibrated_sorted.sorted_draft\n  init_args: {{model: {draft}}}\n"
    spec.write_text(f"sd2:\n  {entry}")
    return spec


def test_every_exit_gets_a_curve_and_every_pair_of_exits_its_cover(calibrate, sorted_spec):
    told = calibrate(sorted_spec, "--temperature", 0.7, "--json").json["drafters"]["sd2"]
    assert set(told["sources"]) == {"sd2:1", "sd2:2"}
    assert set(told["covered_ece"]) == {f"{pair}@{k}" for pair in ("1>1", "1>2", "2>2") for k in (1, 2, 4, 8)}
    assert told["sources"]["sd2:1"]["accepted"] != told["sources"]["sd2:2"]["accepted"]


def test_exits_may_be_chosen_and_others_are_refused(calibrate, sorted_spec):
    assert set(calibrate(sorted_spec, "--exits", "[2]", "--json").json["drafters"]["sd2"]["sources"]) == {"sd2:2"}
    told = calibrate(sorted_spec, "--exits", "[2,3]")
    assert (told.code, told.err.splitlines()[-1][:27]) == (2, "draftsmith calibrate: exit ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "1"], "has 1 answered"),
        (["--min_distinct", "1.1"], "--min_distinct takes a number from 0 to 1"),
        (["--temperature", "1", "--temperatures", "[0,1]"], "give --temperature or --temperatures, not both"),
        (["--exits", "[7]"], "exit 7 is not one of the draft's exits"),
        (["--batch_size", "0"], "batch_size"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(calibrate, draft, words, message):
    told = calibrate(f"small:{draft}", *words)
    assert told.code == 2
    assert message in told.err.splitlines()[-1]
    assert "Traceback" not in told.err
    assert not (draft / "calibration").exists()


def test_a_target_with_another_tokenizer_is_refused_before_it_answers(calibrate, draft, folders):
    told = calibrate(f"small:{draft}", target=folders.stranger)
    assert told.code == 2
    assert "another tokenizer" in told.err
    assert "answers" not in told.err


def test_no_drafters_is_told_in_one_line(calibrate, draft):
    told = calibrate("")
    assert (told.code, len(told.err.splitlines())) == (2, 1)
