"""`draftsmith replay`: what a person gets for recorded answers."""

from __future__ import annotations

import json

import pytest

PROMPT = "what does the fox say to the lazy dog?"
KEYS = {"accepted_length", "acceptance_rate", "hit_rate", "nodes_per_step"}


@pytest.fixture
def replay(call, folders):
    def replay(data, drafters, *words):
        return call("replay", "--data", data, "--tokenizer", folders.target, "--drafters", drafters, *words, "--json")

    return replay


def test_token_ids_of_a_row_are_replayed_with_the_figures_counted_by_hand(replay, rows_file):
    """12 times token 7: two steps know nothing; then the latest match gives one node, and two tokens a step."""
    data = rows_file([{"prompt": "x", "output": "y", "prompt_token_ids": [9], "token_ids": [7] * 12}])
    found = replay(data, "pld[num_draft_tokens=4,matches=1,max_ngram=1]").json
    assert found["drafters"]["pld"]["accepted_length"] == 12 / 7
    assert found["drafters"]["pld"]["nodes_per_step"] == 5 / 7
    assert set(found["drafters"]["pld"]) >= KEYS
    assert (found["streams"], found["tokens"], found["temperature"]) == (1, 12, 0.0)


def test_sampled_drafts_are_refused_above_temperature_0_in_one_line(replay, folders, rows_file):
    data = rows_file([{"prompt": PROMPT, "output": PROMPT}])
    spec = f"small:{folders.draft}[sample=true],pld"
    told = replay(data, spec, "--temperature", 0.8)
    assert told.code == 2
    assert "outright drafts only" in told.err.splitlines()[-1]
    assert "Traceback" not in told.err
    assert set(replay(data, spec).json["drafters"]) == {"small", "pld"}
    assert replay(data, "pld", "--temperature", 0.8).json["drafters"]["pld"]["accepted_length"] > 1


def test_replay_of_the_target_s_own_greedy_answers_equals_decoding(call, replay, folders, rows_file, tmp_path):
    questions = rows_file([{"prompt": PROMPT}, {"prompt": "the dog, the dog, the dog"}, {"prompt": "why?"}])
    out = tmp_path / "answers.jsonl"
    told = call("answers", "--target", folders.target, "--data", questions, "--out", out, "--max_new_tokens", 40)
    assert told.code == 0
    drafters = f"pld,small:{folders.draft},tree=small:{folders.draft}[top_k=3]"
    replayed = replay(out, drafters).json["drafters"]
    words = ["--target", folders.target, "--data", questions, "--drafters", drafters, "--max_new_tokens", 40]
    decoded = call("bench", *words, "--warmup", 0, "--json").json["drafters"]
    for name in ("pld", "small", "tree"):
        for key in KEYS:
            assert replayed[name][key] == pytest.approx(decoded[name][key]), (name, key)
        assert replayed[name]["accepted_length"] > 1.2


def test_a_table_is_printed_for_people_and_bad_rows_are_counted(call, folders, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": PROMPT, "output": PROMPT}) + "\n{broken\n")
    words = ["--data", path, "--tokenizer", folders.target, "--drafters", "pld"]
    told = call("replay", *words)
    assert told.code == 2
    assert "row 2" in told.err
    told = call("replay", *words, "--on_bad", "skip")
    assert told.code == 0
    assert "1 skipped" in told.out
    assert "pld" in told.out


@pytest.mark.parametrize("drafters", ["", "oracle"])
def test_a_drafter_that_cannot_be_replayed_is_told_in_one_line(replay, rows_file, drafters):
    told = replay(rows_file([{"prompt": PROMPT, "output": "x"}]), drafters)
    assert told.code == 2
    assert "Traceback" not in told.err
