"""The comparison of rules for exits, as its script runs it; and the slower target that says the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.recipes.studies.slow_target import slow_target

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
WORDS = ["fox", "dog", "the lazy dog", "brown", "jumps", "over", "what", "says", "quick", "to that"]


@pytest.mark.slow
def test_the_script_calibrates_benches_every_rule_and_compares(
    script: Any, folders: Any, rows_file: Any, tmp_path: Path
) -> None:
    draft = tmp_path / "draft"
    shutil.copytree(folders.draft, draft)
    config = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps(config | {"sorted_exits": [1, 2]}))
    prompts = [{"question_id": i, "category": "words", "turns": [f"say {word}"]} for i, word in enumerate(WORDS)]
    done = script(
        "bench_sd2", "--max_new_tokens", "12", "--warmup", "0", TARGET=folders.target, DRAFT=draft, EXITS="1 2",
        HELD_OUT=rows_file(prompts), QUESTIONS=rows_file(prompts[:2], "questions.jsonl"), OUT=tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    figures = _results(tmp_path / "run")
    assert set(figures) == {"plain", "cost", "threshold", "level", "exit1", "chain1", "exit2", "chain2"}
    for name in figures:
        assert figures[name]["total"] == 2
    # Whether it pays to draft is the machine's to say; what is drafted leaves where it was told to.
    assert set(figures["exit2"]["by_exit"]) <= {"2"}
    assert list((draft / "calibration").glob("*.json"))
    assert done.stdout.count("Compared with") == 2


def test_bench_and_compare_show_the_exits(call: Any, folders: Any, rows_file: Any, tmp_path: Path) -> None:
    data = rows_file([{"question_id": 1, "category": "words", "turns": ["say fox"]}])
    drafter = f"sd2:{folders.draft}[exits=[1,2],selection=threshold,thresholds=[0.03,0],costs=none]"
    words = ["--target", folders.target, "--data", data, "--drafters", drafter, "--out", tmp_path / "run"]
    done = call("bench", *words, "--max_new_tokens", 16, "--warmup", 0, "--dtype", "float32")
    assert done.code == 0
    assert "Exits used, by depth" in done.out
    (figures,) = [row for name, row in _results(tmp_path / "run").items() if name != "plain"]
    assert set(figures["by_exit"]) == {"1", "2"}
    for exit, nodes in figures["by_exit"].items():
        assert sum(row["exits"].get(exit, 0) for row in figures["exits_by_depth"]) == nodes
    done = call("compare", tmp_path / "run", tmp_path / "run")
    assert f"exits used: {figures['by_exit']['1']} nodes after 1 layers" in done.out


def _results(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "results.json").read_text())["drafters"]
    return found


def test_a_slow_target_says_the_same(folders: Any, tmp_path: Path) -> None:
    from draftsmith.infer.models.load import load_model

    slow_target(target=folders.target, blocks=3, out=str(tmp_path / "slow"))
    slow, _ = load_model(str(tmp_path / "slow"), dtype="float32", device="cpu")
    own, _ = load_model(folders.target, dtype="float32", device="cpu")
    assert slow.config.num_hidden_layers == own.config.num_hidden_layers + 3
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        assert torch.equal(slow(ids).logits, own(ids).logits)
    with pytest.raises(ValueError, match="at least 1"):
        slow_target(target=folders.target, blocks=0, out=str(tmp_path / "none"))
