"""The study of the mix against its drafters: same nodes for all, the silent source, and what falls short."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from draftsmith.recipes.studies import run_study
from draftsmith.recipes.studies.mixed import mixed, shortfalls

PROMPTS = ["what does the fox say to the lazy dog?", "the dog, the dog", "how does a fox jump?", "over the brown dog"]


def test_all_drafters_run_at_each_number_of_nodes(
    folders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    code = run_study(mixed, [
        "--target", str(folders.target), "--draft", str(folders.draft), "--data", str(data), "--min_distinct", "0",
        "--max_new_tokens", "6", "--nodes", "[3]", "--json",
    ])  # fmt: skip
    line, last = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert {"pld-3", "small-3", "mix-3", "silent-3"} <= set(found["drafters"])
    measured = [one for name, one in found["drafters"].items() if name != "plain"]
    assert all(one["equal"] == one["total"] == len(PROMPTS) and not one["errors"] for one in measured)
    assert all(one["nodes_per_step"] <= 3 for one in measured)
    silent = found["drafters"]["silent-3"]
    assert silent["accepted_length"] == found["drafters"]["small-3"]["accepted_length"]
    assert [one["name"] for one in found["compared"]] == ["mix-3", "silent-3"]
    assert code == bool(shortfalls(found["compared"])) == (last != "the mix is worth what is wanted of it")


def test_what_falls_short_is_named() -> None:
    mix = {"name": "mix-8", "base": "small-8", "longer": 1.2, "faster": 1.05}
    worse = {"name": "mix-4", "base": "small-4", "longer": 1.0, "faster": 0.5}
    silent = {"name": "silent-8", "base": "small-8", "longer": 1.0, "faster": 0.99}
    assert shortfalls([worse, mix, silent]) == ["mix-8 is 1.05 times as fast as small-8, and 1.1 is wanted"]
    assert shortfalls([{**mix, "faster": 1.1}, silent]) == []
    assert len(shortfalls([{**mix, "longer": 1.0}, {**silent, "faster": 0.9}])) == 3
