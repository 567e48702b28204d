"""The short names of --drafters, and how commands report questions that they could not read."""

from __future__ import annotations

import json

import pytest

from draftsmith.infer.drafters.registry import short_names
from draftsmith.recipes.cli import inputs as module
from draftsmith.recipes.cli.inputs import parse_drafters

NAMES_THAT_STAY = {
    "pld": ("draftsmith.retrieval.PromptLookup", None),
    "rest": ("draftsmith.retrieval.Rest", "store"),
    "dresd": ("draftsmith.retrieval.Dresd", "store"),
    "small": ("draftsmith.infer.drafters.SmallLM", "model"),
    "sd2": ("draftsmith.infer.drafters.SD2", "model"),
    "eagle": ("draftsmith.infer.drafters.Eagle", "model"),
    "mtp": ("draftsmith.infer.drafters.MTP", "model"),
    "empty": ("draftsmith.infer.drafters.controls.Empty", None),
    "oracle": ("draftsmith.infer.drafters.controls.oracle", None),
    "adversary": ("draftsmith.infer.drafters.controls.adversary", None),
}


def test_the_names_that_other_peoples_scripts_use_stay():
    found = {name: (entry["class_path"], entry.get("argument")) for name, entry in short_names().items()}
    assert {name: found.get(name) for name in NAMES_THAT_STAY} == NAMES_THAT_STAY


def test_plain_is_kept_for_decoding_without_a_drafter(monkeypatch):
    monkeypatch.setattr(module, "short_names", lambda: {"any": {"class_path": "builtins.object"}})
    assert list(parse_drafters("any,mine=any")) == ["any", "mine"]
    with pytest.raises(ValueError, match="'plain' is the name of decoding without a drafter"):
        parse_drafters("plain=any")


ROWS = [
    json.dumps({"prompt": "what does the fox say?", "output": "nothing", "ts": 1.76e9}),
    json.dumps(
        {"request": {"messages": [{"role": "user", "content": "x"}]}, "response": {"error": {"message": "busy"}}}
    ),
    json.dumps({"messages": [{"role": "user", "content": "and the dog?"}, {"role": "assistant", "content": "much"}]}),
]


@pytest.fixture
def log(tmp_path):
    def write(*rows: str) -> str:
        path = tmp_path / "log.jsonl"
        path.write_text("\n".join(rows) + "\n")
        return str(path)

    return write


@pytest.mark.parametrize(
    "words",
    [
        ("bench", "--drafters", "pld", "--warmup", "0"),
        ("generate", "--drafters", "pld"),
        ("answers", "--out", "OUT"),
    ],
)
def test_rows_that_hold_no_question_are_told_and_the_others_asked(call, folders, log, tmp_path, words):
    words = [str(tmp_path / "out.jsonl") if word == "OUT" else word for word in words]
    told = call(*words, "--target", folders.target, "--data", log(*ROWS), "--max_new_tokens", 4)
    assert told.code == 0, told.err
    assert "3 rows read, 2 used, 1 skipped" in told.err
    assert "a response that is an error: " in told.err


def test_a_log_with_a_broken_row_is_answered_where_bad_rows_may_be_skipped(call, folders, log, tmp_path):
    words = ("answers", "--target", folders.target, "--data", log(*ROWS, '{"prompt": "cut of'), "--max_new_tokens", 4,
             "--out", tmp_path / "a.jsonl")  # fmt: skip
    refused = call(*words)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "row 4 is not valid JSON" in refused.err
    assert "--on_bad skip" in refused.err
    assert call(*words, "--on_bad", "skip", "--json").json["answered"] == 2
    assert call(*words, "--on_bad", "skip", "--json").json["there_already"] == 2


def test_nothing_is_told_where_nothing_was_skipped(call, folders, log):
    told = call("generate", "--target", folders.target, "--data", log(ROWS[0]), "--max_new_tokens", 4)
    assert told.code == 0
    assert "rows read" not in told.err
