"""The recipes that bench drafters on known question sets: each runs, samples as it says, and can be overridden."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SAMPLED = {"bench_mtbench": (0.7, 0.8), "bench_humaneval": (0.8, 0.95)}
QUESTIONS = {
    "bench_mtbench": [{"question_id": 81, "category": "writing", "turns": ["what does the fox say?", "and the dog?"]},
                      {"question_id": 82, "category": "math", "turns": ["the dog, the dog", "why?"]}],
    "bench_humaneval": [{"task_id": "HumanEval/0", "prompt": "def f(x):\n    return", "entry_point": "f"},
                        {"task_id": "HumanEval/1", "prompt": "def g(x):\n    x", "entry_point": "g"}],
}  # fmt: skip
SMALL = ["--max_new_tokens", "16", "--warmup", "0", "--dtype", "float32"]


def check(run: Path, name: str) -> None:
    """The run was sampled as the recipe says, and drafts changed no token: outright ones give plain's own."""
    sampling = json.loads((run / "run.json").read_text())["sampling"]
    assert (sampling["temperature"], sampling["top_p"]) == SAMPLED[name]
    figures = json.loads((run / "results.json").read_text())["drafters"]["pld"]
    assert (figures["equal"], figures["total"]) == (2, 2)
    assert figures["accepted_length"] >= 1


@pytest.mark.parametrize("name", SAMPLED)
def test_a_recipe_runs_and_samples_as_it_says(
    call: Any, folders: Any, rows_file: Any, tmp_path: Path, name: str
) -> None:
    data = rows_file(QUESTIONS[name])
    words = ["--config", RECIPES / f"{name}.yaml", "--target", folders.target, "--data", data, "--drafters", "pld"]
    assert call("bench", *words, "--out", tmp_path / "run", *SMALL).code == 0
    check(tmp_path / "run", name)


@pytest.mark.parametrize("name", ["bench_mtbench", pytest.param("bench_humaneval", marks=pytest.mark.slow)])
def test_a_script_is_the_documented_way_in(
    script: Any, folders: Any, rows_file: Any, tmp_path: Path, name: str
) -> None:
    words = [name, "--out", tmp_path / "run", *SMALL]
    done = script(*words)
    assert done.returncode != 0
    assert "name the target" in done.stderr
    done = script(*words, TARGET=folders.target, QUESTIONS=rows_file(QUESTIONS[name]))
    assert done.returncode == 0, done.stderr
    check(tmp_path / "run", name)
