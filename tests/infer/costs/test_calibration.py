"""Calibrations: to a file and back, refused files, and one draft with a file for each of its targets."""

import json
import logging
from dataclasses import replace

import pytest
import torch

from draftsmith.infer.costs.calibration import (
    BandedCalibration,
    Calibration,
    band_of,
    calibration_path,
    costs_path,
    covered_key,
    find_calibration,
    find_costs,
    given_costs,
)
from draftsmith.infer.costs.calibrator import Calibrator
from draftsmith.infer.costs.identity import TargetIdentity, machine
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.files.atomic import write_json
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.recorded_target import RecordedTarget

CURVE = Calibrator((0.1, 0.9), (0.2, 0.6))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def targets(make_model):
    return [HFTarget(make_model("llama", seed=seed)) for seed in (0, 1)]


def test_a_calibration_comes_back_from_a_file(tmp_path):
    calibration = Calibration("abc", {"small": CURVE}, {covered_key(1, 2, 4): CURVE}, {"small": {"ece": 0.1}})
    warm = Calibration("abc", {"small": Calibrator((0.5,), (0.3,))}, temperature=0.7)
    both = BandedCalibration.of(calibration, warm)
    both.save(tmp_path / "a" / "b.json")
    assert BandedCalibration.load(tmp_path / "a" / "b.json") == both
    assert list(calibration.covered) == ["1>2@4"]
    assert set(both.bands) == {"greedy", "(0.6, 0.85]"}


def test_every_temperature_has_one_band():
    bands = [band_of(temperature) for temperature in (0.0, 0.01, 0.3, 0.31, 0.6, 0.7, 0.8, 1.0, 1.1, 1.5, 2.0)]
    assert bands == ["greedy", *["(0, 0.3]"] * 2, *["(0.3, 0.6]"] * 2, *["(0.6, 0.85]"] * 2, *["(0.85, 1.1]"] * 2,
                     *["(1.1, ...)"] * 2]  # fmt: skip


def test_a_band_that_was_not_measured_uses_the_nearest_and_says_so_once(caplog):
    curve = {temperature: Calibrator((0.5,), (1 / (2 + temperature),)) for temperature in (0.0, 0.7, 1.5)}
    known = BandedCalibration.of(*(Calibration("t", {"small": one}, temperature=t) for t, one in curve.items()))
    with caplog.at_level(logging.WARNING):
        assert [known.at(t).curves["small"] for t in (0.0, 0.65, 0.8, 2.0)] == [
            curve[0.0], curve[0.7], curve[0.7], curve[1.5]
        ]  # fmt: skip
        assert not caplog.records
        for _ in range(3):
            assert known.at(0.2).curves["small"] == curve[0.0]
            assert known.at(1.0).curves["small"] == curve[0.7]
    assert len(caplog.records) == 2
    assert "the one measured at 0.7 is used; `draftsmith calibrate --temperature 1` measures it" in caplog.text
    assert BandedCalibration("t", {}).at(0.0) is None


def test_the_format_without_bands_is_refused_with_the_command_to_run_again(tmp_path):
    (tmp_path / "old.json").write_text(json.dumps({"kind": "calibration", "format": 1, "target": "a", "curves": {}}))
    with pytest.raises(ValueError, match="has format 1; this version reads 2: run `draftsmith calibrate` again"):
        BandedCalibration.load(tmp_path / "old.json")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"kind": "costs", "format": 1}',
        '{"kind": "calibration", "format": 99}',
        '{"kind": "calibration", "format": 1}',
        '{"kind": "calibration", "format": 2}',
        '{"kind": "calibration", "format": 2, "target": "a", "bands": {"greedy": 3}}',
        '{"kind": "calibration", "format": 2, "target": "a", "bands": {"greedy": {"temperature": 0, "curves": {"s": '
        '{"raw": [0.2, 0.1], "probability": [0.1, 0.2]}}, "covered": {}, "measured": {}}}}',
    ],
)
def test_another_file_is_refused_with_one_line(tmp_path, text):
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(ValueError, match=r"calibration\.json") as refused:
        BandedCalibration.load(tmp_path / "calibration.json")
    assert "\n" not in str(refused.value)


def test_one_draft_has_a_file_for_each_target(tmp_path, targets):
    draft = tmp_path / "draft"
    draft.mkdir()
    for target, top in zip(targets, (0.6, 0.7)):
        assert find_calibration(draft, target) is None
        fingerprint = target.fingerprint()
        one = Calibration(fingerprint, {"small": Calibrator((0.1, 0.9), (0.2, top))})
        BandedCalibration.of(one).save(calibration_path(draft, fingerprint))
    found = [find_calibration(draft, target) for target in targets]
    tops = [one.at(0.0).curves["small"](1.0) for one in found if one]
    assert tops == [0.6, 0.7]
    assert len(list((draft / "calibration").iterdir())) == 2


def test_a_draft_that_is_no_folder_has_its_files_in_the_cache(tmp_path, targets):
    path = calibration_path("owner/model", "abc")
    assert path.is_relative_to(tmp_path / "cache")
    assert path.name == "abc.json"
    one = Calibration(targets[0].fingerprint(), {"small": CURVE})
    BandedCalibration.of(one).save(calibration_path("owner/model", targets[0].fingerprint()))
    found = find_calibration("owner/model", targets[0])
    assert found is not None
    assert found.at(0.0).curves["small"] == CURVE


def test_a_calibration_for_another_target_is_refused(tmp_path, targets):
    draft = tmp_path / "draft"
    draft.mkdir()
    BandedCalibration.of(Calibration("0" * 64, {})).save(calibration_path(draft, targets[0].fingerprint()))
    with pytest.raises(ValueError, match="another target"):
        find_calibration(draft, targets[0])


def costs_of(target, **machine_facts):
    weight = next(target.model.parameters())
    here = machine(weight.device, weight.dtype) | machine_facts
    return Costs({"target": PassCost([1], [2.0])}, 0.0, here, TargetIdentity.of("mine", target))


def test_given_costs_of_another_target_or_machine_are_refused_in_one_line(tmp_path, targets):
    path = tmp_path / "costs.json"
    write_json(path, costs_of(targets[0]).to_json())
    assert given_costs(str(path), "", targets[0]).of("target").even(1, 1, 0) == 2.0
    assert given_costs(str(path), "", RecordedTarget({}, 10)) is not None
    with pytest.raises(ValueError, match=r"costs\.json holds the costs of another target, mine on .*: run `draftsmith"):
        given_costs(str(path), "", targets[1])
    for changed in ({"name": "another CPU"}, {"threads": 96}, {"dtype": "float16"}):
        write_json(path, costs_of(targets[0], **changed).to_json())
        with pytest.raises(ValueError, match=r"costs\.json was measured on .*, and this is .*: run `draftsmith"):
            given_costs(str(path), "", targets[0])


def test_costs_of_random_weights_hold_for_the_target_with_that_config(targets, make_model):
    """`plan` has no weights: it records the config and the number of parameters."""
    planned = replace(TargetIdentity.of("x", targets[0]), fingerprint="")
    assert planned.is_same(TargetIdentity.of("y", targets[0]))
    wider = HFTarget(make_model("llama", num_hidden_layers=5))
    assert not planned.is_same(TargetIdentity.of("x", wider))


def test_costs_belong_to_machine_target_dtype_and_the_draft_s_shape(tmp_path, targets, make_model):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"layers": name}))
    assert find_costs(tmp_path / "one", targets[0]) is None
    write_json(costs_path(tmp_path / "one", targets[0]), costs_of(targets[0]).to_json())
    found = find_costs(tmp_path / "one", targets[0])
    assert found is not None
    assert found.of("target").even(1, 1, 0) == 2.0
    assert find_costs(tmp_path / "two", targets[0]) is None
    assert find_costs(tmp_path / "one", targets[1]) is None
    assert find_costs(tmp_path / "one", HFTarget(make_model("llama", dtype=torch.float32))) is None
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert find_costs(tmp_path / "one", targets[0]) is None
    finally:
        torch.set_num_threads(threads)


def test_recorded_answers_have_no_calibration_and_no_costs(tmp_path):
    assert find_calibration(tmp_path, RecordedTarget({}, 10)) is None
    assert find_costs(tmp_path, RecordedTarget({}, 10)) is None


def test_joined_calibrations_hold_both_and_the_newer_wins():
    older = Calibration("t", {"small": CURVE, "rest": CURVE}, {}, {"small": 1, "rest": 1})
    newer = Calibration("t", {"small": Calibrator((0.5,), (0.5,))}, {"1>2@1": CURVE}, {"small": 2})
    older = Calibration("t", {**older.curves, "small#1": CURVE, "rest#1": CURVE}, {}, older.measured)
    joined = older.joined(newer)
    assert joined.curves == {"small": newer.curves["small"], "rest": CURVE, "rest#1": CURVE}
    assert joined.measured == {"small": 2, "rest": 1}
    assert set(joined.covered) == {"1>2@1"}


def test_a_candidate_is_read_by_the_curve_of_its_rank_where_there_is_one():
    curves = {
        "small": Calibrator((0.5,), (0.1,)),
        "small#1": Calibrator((0.5,), (0.7,)),
        "small#3": Calibrator((0.5,), (0.2,)),
    }
    calibration = Calibration("t", curves)
    assert calibration.probabilities("small", [0.4] * 6) == [0.7, 0.1, 0.2, 0.2, 0.1, 0.1]
    assert Calibration("t", {"small": CURVE}).of("small", 0) == CURVE
    with pytest.raises(ValueError, match="'sd2:1' was not calibrated, only small"):
        calibration.of("sd2:1", 0)


def test_coupled_curves_and_those_of_likeliest_tokens_are_never_used_for_each_other(tmp_path, caplog):
    curve = {"small": Calibrator((0.0, 1.0), (0.1, 0.9))}
    greedy, warm = Calibration("t", curve), Calibration("t", curve, temperature=0.8)
    coupled = Calibration("t", curve, temperature=0.8, coupled=True)
    BandedCalibration.of(greedy, warm, coupled).save(tmp_path / "it.json")
    found = BandedCalibration.load(tmp_path / "it.json")
    assert found.at(0.7) == warm
    assert found.at(0.7, coupled=True) == coupled
    assert found.at(2.0, coupled=True) == coupled
    assert found.at(0.0, coupled=True) == greedy
    assert BandedCalibration.of(coupled).at(0.0) is None
    with caplog.at_level("WARNING"):
        assert BandedCalibration.of(greedy, warm).at(0.8, coupled=True) is None
    assert "no calibration of coupled drafts was measured at temperature 0.8" in caplog.text
    assert "confidence is used raw" in caplog.text
