"""The study of `draftsmith plan`: each pair is printed, and four of five have to hold."""

from __future__ import annotations

import json

import pytest
from tiny_folders import tiny_llama

from draftsmith.infer.costs import timing
from draftsmith.recipes.studies.plan import check_plan, within


def test_each_pair_is_printed_and_four_of_five_have_to_hold(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "ROUNDS", (1, 1))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny_llama(num_hidden_layers=4).config.to_dict(), default=str))
    options = {"target": str(config), "shapes": "1x32,2x32,1x16", "batch_sizes": [2], "context": 16, "json": True}
    code = check_plan(pairs="2x16@3,2x32@5", max_new_tokens=16, repeats=1, **options)
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["shape"], row["length"]) for row in said["pairs"]] == [("2x16", 3), ("2x32", 5)]
    assert [row["shape_measured"] for row in said["pairs"]] == [False, True]
    assert (code == 0) == (said["within"] >= 0.8 * said["total"])
    with pytest.raises(ValueError, match="is no pair"):
        check_plan(pairs="2x16", **options)


def test_within_counts_both_sides():
    assert within([{"error": 0.1}, {"error": -0.16}, {"error": 0.16}, {"error": -0.15}], 0.15) == 2
