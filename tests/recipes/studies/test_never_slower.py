"""The study of every drafter against plain decoding: it calibrates what is missing and names the cells that lose."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.costs.calibration import find_calibration, find_costs
from draftsmith.infer.measure.bench import Measured, Outcome, Turn
from draftsmith.infer.measure.runners import Question
from draftsmith.infer.models.load import load_target
from draftsmith.recipes.studies import run_study
from draftsmith.recipes.studies.never_slower import below, by_visits, never_slower

PROMPTS = ["what does the fox say to the lazy dog?", "the dog, the dog", "how does a fox jump?", "over the brown dog"]


@pytest.fixture
def words(folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "cache"))
    draft = shutil.copytree(folders.draft, tmp_path / "draft")
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return ["--target", str(folders.target), "--draft", str(draft), "--data", str(data), "--min_distinct", "0",
            "--max_new_tokens", "6", "--seconds", "30"]  # fmt: skip


def test_every_cell_is_measured_with_what_was_calibrated_before(
    words: list[str], folders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    words = [*words, "--visits", "8", "--out", str(out), "--json"]
    run_study(never_slower, [*words, "--batch_sizes", "[1,4]"])
    printed = capsys.readouterr()
    *_, line, last = printed.out.splitlines()
    told = json.loads(line)
    assert told == json.loads(out.read_text())
    cells = told["cells"]
    assert [(one["temperature"], one["batch_size"], one["drafter"]) for one in cells] == [
        (heat, size, name) for heat in (0.0, 0.8) for size in (1, 4) for name in ("pld", "small", "adversary")
    ]
    assert all(one["equal"] == one["total"] == len(PROMPTS) and not one["errors"] for one in cells)
    assert all(one["interval"][0] <= one["end_to_end_speedup"] <= one["interval"][1] for one in cells)
    wrong = [one for one in cells if one["drafter"] == "adversary"]
    assert all(one["accepted_length"] == 1 for one in wrong)
    assert any(one["nodes_per_step"] for one in wrong), "it was never tried"
    losing = [one for one in cells if one["interval"][0] < 0.97]
    assert last.startswith("lower end under 0.97: ")
    assert all(f"{one['drafter']} T={one['temperature']:g} batch {one['batch_size']}: " in last for one in losing)
    assert last.count("batch") == len(losing)
    target = load_target(folders.target)
    for home in ("pld", str(tmp_path / "draft")):
        found = find_calibration(home, target)
        assert found is not None
        assert len(found.bands) == 2
        assert find_costs(home, target) is not None
    run_study(never_slower, [*words, "--drafters", "[pld]", "--batch_sizes", "[4]", "--temperatures", "[0]"])
    again = capsys.readouterr()
    assert "answers written" in printed.err
    assert "answers written" not in again.err, "it was calibrated before"
    assert len(json.loads(again.out.splitlines()[-2])["cells"]) == 1


def test_a_drafter_without_its_model_is_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match="cannot measure 'sd2'"):
        run_study(never_slower, [*words, "--drafters", "[sd2]"])


def cell(interval: Any, errors: int = 0) -> dict[str, Any]:
    return {"interval": interval, "errors": errors}


def test_a_cell_loses_by_its_lower_end_or_where_nothing_can_be_said():
    good, low, unknown, failed = cell([0.98, 1.2]), cell([0.96, 1.2]), cell(None), cell([1.0, 1.1], errors=1)
    assert below([good, low, unknown, failed]) == [low, unknown, failed]


def measured_with(slow_visit: int) -> Measured:
    """Eight batches of two questions, each visited twice; one visit takes three times as long as the others."""
    questions = [Question(i, "", ("?",)) for i in range(16)]
    outcomes: dict[str, dict[int | str, list[Outcome]]] = {"plain": {}, "it": {}}
    for i in range(16):
        for name, by_id in outcomes.items():
            seconds = [3.0 if name == "it" and 2 * (i // 2) + repeat == slow_visit else 1.0 for repeat in range(2)]
            by_id[i] = [Outcome([Turn("", Generation(str(i), [1] * 10, "length", 1), one)]) for one in seconds]
    return Measured(questions, "plain", 2, 0, 2, outcomes)


def test_batches_are_resampled_not_questions():
    """Of 16 visits, one is slow: in a third of all resamples it is not drawn at all."""
    interval = by_visits(measured_with(5), "it", set())
    assert interval is not None
    assert interval[1] == 1.0
    assert interval[0] == pytest.approx(16 / (16 + 2 * 3), rel=0.1)
    alone = by_visits(measured_with(5), "it", set(range(4, 16)))
    assert alone is None, "two batches visited twice are too few"
    without = by_visits(measured_with(5), "it", {4, 5})
    assert without == (1.0, 1.0)
