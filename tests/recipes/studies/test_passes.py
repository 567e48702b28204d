"""The study of passes runs on a CPU with a tiny model, and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from draftsmith.recipes.studies import run_study
from draftsmith.recipes.studies.passes import passes


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_steps_are_timed_beside_a_static_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "passes.json"
    words = ["--shapes", "[tiny]", "--batches", "[1,3]", "--device", "cpu", "--dtype", "float32", "--rounds", "2"]
    run_study(passes, [*words, "--prompt", "12", "--steps", "8", "--out", str(out)])
    found = json.loads(out.read_text())
    first = found["tiny"]["first_token"]
    assert set(first) == {"ours", "generate", "ratio"}
    assert min(first.values()) > 0
    assert list(found["tiny"]["batches"]) == ["1", "3"]
    for one in found["tiny"]["batches"].values():
        assert set(one) == {"ours", "static", "ratio", "share", "overhead"}
        assert one["ours"] > 0
        assert one["ratio"] == pytest.approx(one["static"] / one["ours"])
        assert 0 < one["overhead"] < 1
        assert one["share"] > 0
    assert "static cache" in capsys.readouterr().out
