"""The study of forecasts against the loop, on tiny models."""

from __future__ import annotations

import json

import pytest

from draftsmith.recipes.studies import run_study
from draftsmith.recipes.studies.forecast import forecast


def test_every_cell_is_measured_once_and_said_to_agree_or_not(folders, tmp_path, capsys):
    data, out = tmp_path / "questions.jsonl", tmp_path / "out.json"
    data.write_text("".join(json.dumps({"prompt": f"what does fox {i} say?"}) + "\n" for i in range(12)))
    words = ["--target", folders.target, "--drafts", json.dumps([folders.draft]), "--data", json.dumps([str(data)]),
             "--temperatures", "[0.8]", "--max_new_tokens", "16", "--out", str(out), "--json"]  # fmt: skip
    run_study(forecast, [*words, "--lengths", "[2]", "--rules", '["token"]'])
    capsys.readouterr()
    first = json.loads(out.read_text())["cells"]
    run_study(forecast, [*words, "--lengths", "[2,5]"])
    *_, line, last = capsys.readouterr().out.splitlines()
    cells = json.loads(line)["cells"]
    assert cells[:1] == first
    assert {(one["rule"], one["length"]) for one in cells} >= {("token", 2), ("token", 5)}
    for cell in cells:
        assert 1 < cell["forecast"] < cell["length"] + 1
        assert cell["agrees"] == (cell["difference_interval"][0] <= 0 <= cell["difference_interval"][1])
        assert cell["texts"] == 12
    assert last == f"{sum(one['agrees'] for one in cells)} of {len(cells)} cells agree"
    with pytest.raises(ValueError, match="unknown rule"):
        run_study(forecast, [*words, "--rules", '["nonsense"]'])
