"""The study of rules in sampled text: equal nodes for all, and every variant compared with the same one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from draftsmith.recipes.studies import run_study
from draftsmith.recipes.studies.sampling_rules.__main__ import BASE, VARIANTS, sampling_rules

PROMPTS = ["what does the fox say to the lazy dog?", "the dog, the dog", "how does a fox jump?"]


def test_every_rule_and_kind_of_draft_is_compared_at_equal_nodes(
    folders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    words = ["--target", str(folders.target), "--draft", str(folders.draft), "--data", str(data)]
    words += ["--min_distinct", "0", "--max_new_tokens", "8", "--nodes", "3", "--depth", "3"]
    code = run_study(sampling_rules, [*words, "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not code
    for name in VARIANTS:
        assert (found[name]["errors"], found[name]["questions"], found[name]["base"]) == (0, len(PROMPTS), BASE)
        assert 1 < found[name]["nodes_per_step"] <= 3
        assert 1 <= found[name]["accepted_length"] <= 4
    assert found[BASE]["longer"] == pytest.approx(1.0)
    assert len({found[name]["accepted_length"] for name in VARIANTS}) > 2
