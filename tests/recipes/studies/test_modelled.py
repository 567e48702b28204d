"""The study of modelled costs compares them with timed passes, and fails if too few hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from draftsmith.infer.measure.plan import this_machine
from draftsmith.recipes.studies import modelled as study


def test_a_shape_is_modelled_timed_and_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "TRIED", (study.TriedShape(2, 64, 4, 2, 256, 2, 16),))
    monkeypatch.setattr(this_machine, "MATRICES", ((64, 64),))
    codes = []
    for within in (1e9, 0.0):
        monkeypatch.setattr(study, "WITHIN", within)
        codes.append(study.modelled(out=str(tmp_path / "out.json"), threads=1, seconds=3.0, group_mib=1))
    assert codes == [0, 1]
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["error"] == pytest.approx(row["modelled_s"] / row["measured_s"] - 1)
    assert "0 of 1 within 0% of the measured seconds" in capsys.readouterr().out
