"""`draftsmith answers` as a process: killed at any moment and taken up again, as if it had not been killed."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from pathlib import Path

import processes
import pytest
from scripted_server import Scripted, said

from draftsmith.infer.text.records import read_records

KILLS = 3
PROMPTS = 96


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Prompts with ids, some of them twice, without ids, and of several turns."""
    rows: list[dict] = []
    for i in range(PROMPTS):
        row: dict = {"id": f"q{i % 80}", "category": "qa"}
        if i % 5 == 0:
            row |= {"turns": [f"first of {i}", f"then of {i}", "and last"]}
        elif i % 7 == 0:
            row |= {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": f"say {i}"}]}
        else:
            row |= {"prompt": f"what is {i} times {i}?"}
        rows.append(row if i % 3 else {key: value for key, value in row.items() if key != "id"})
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def words(folders, questions, out, *more):
    return ["answers", "--target", folders.target, "--data", questions, "--out", str(out),
            "--max_new_tokens", "24", "--preset", "nucleus", "--batch_size", "4", *more]  # fmt: skip


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_key(rows):
    found = {row["question_id"]: row for row in rows}
    assert len(found) == len(rows), "a row was doubled"
    return found


@pytest.fixture(scope="module")
def uninterrupted(folders, questions, tmp_path_factory):
    from draftsmith.recipes.cli.main import run

    out = tmp_path_factory.mktemp("whole") / "answers.jsonl"
    assert run(words(folders, questions, out)) == 0
    return by_key(rows_of(out))


def test_killed_at_random_moments_no_row_is_lost_and_none_doubled(
    folders, questions, uninterrupted, tmp_path, call, record_property
):
    out = tmp_path / "answers.jsonl"
    command = words(folders, questions, out)
    seed = random.SystemRandom().randrange(1 << 30)
    record_property("seed", seed)
    chance = random.Random(seed)
    held = []
    for _ in range(KILLS):
        before = out.stat().st_size if out.exists() else 0
        process = processes.Started(processes.COMMAND, *command)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if out.exists() and out.stat().st_size > before:
                break
            time.sleep(0.002)
        time.sleep(chance.uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL, process.stderr
        held.append(out.read_bytes().count(b"\n"))
    assert 0 < held[0] < held[-1] < PROMPTS
    summary = call(*words(folders, questions, out, "--json")).json
    assert summary["there_already"] + summary["answered"] == PROMPTS
    assert summary["there_already"] == held[-1]
    assert by_key(rows_of(out)) == uninterrupted


def test_token_ids_are_kept_and_decode_to_the_outputs(folders, uninterrupted):
    tokenizer = folders.tokenizer
    several = 0
    for row in uninterrupted.values():
        turns = row.get("turns", [row.get("prompt")])
        outputs = row.get("outputs", [row.get("output")])
        token_ids = row.get("token_ids_by_turn", [row.get("token_ids")])
        prompts = row.get("prompt_token_ids_by_turn", [row.get("prompt_token_ids")])
        assert len(turns) == len(outputs) == len(token_ids) == len(prompts)
        several += len(turns) > 1
        said = []
        if "messages" in row:
            said = row["messages"][:1]
            assert said == [{"role": "system", "content": "be brief"}]
        for turn, output, ids, prompt in zip(turns, outputs, token_ids, prompts):
            assert tokenizer.decode(ids, skip_special_tokens=True) == output
            assert 1 <= len(ids) <= 24
            said = [*said, {"role": "user", "content": turn}]
            assert tokenizer.apply_chat_template(said, add_generation_prompt=True)["input_ids"] == prompt
            said = [*said, {"role": "assistant", "content": output}]
    assert several == -(-PROMPTS // 5)
    assert len({json.dumps(row.get("token_ids")) for row in uninterrupted.values()}) > 40


def test_a_drafter_changes_no_answer(call, folders, questions, uninterrupted, tmp_path):
    """Outright drafts give the very tokens of plain sampling, in another batch size too."""
    out = tmp_path / "answers.jsonl"
    told = call(*words(folders, questions, out, "--drafters", "pld", "--limit", 12), "--batch_size", 7)
    assert told.code == 0
    found = by_key(rows_of(out))
    assert len(found) == 12
    assert all(row == uninterrupted[key] for key, row in found.items())


def test_a_resumed_run_refuses_other_settings_and_keeps_the_rows(call, folders, questions, tmp_path):
    out = tmp_path / "answers.jsonl"
    assert call(*words(folders, questions, out, "--limit", 3)).code == 0
    before = out.read_bytes()
    told = call(*words(folders, questions, out, "--limit", 3, "--seed", 1))
    assert told.code == 2
    assert "other settings (sampling, seed)" in told.err
    assert len(told.err.splitlines()) == 1
    assert out.read_bytes() == before
    summary = call(*words(folders, questions, out, "--limit", 5, "--json")).json
    assert (summary["there_already"], summary["answered"]) == (3, 2)
    assert out.read_bytes().startswith(before)


def test_a_mistyped_target_does_not_stand_in_the_way_of_the_right_one(call, folders, questions, tmp_path):
    out = tmp_path / "answers.jsonl"
    wrong = call("answers", "--target", tmp_path / "nowhere", "--data", questions, "--out", out)
    assert wrong.code == 2
    assert "nowhere" in wrong.err
    assert call(*words(folders, questions, out, "--limit", 1)).code == 0


def test_what_was_written_is_read_back_and_replayed(call, folders, questions, tmp_path):
    out = tmp_path / "answers.jsonl"
    assert call(*words(folders, questions, out, "--limit", 6)).code == 0
    told = call("replay", "--data", out, "--tokenizer", folders.target, "--drafters", "pld", "--json").json
    turns = sum(len(row.get("turns", [0])) for row in rows_of(out))
    assert told["streams"] == turns


@pytest.mark.parametrize("given", [[], ["--target", "x", "--server", "http://127.0.0.1:9"]])
def test_one_of_target_and_server_is_needed(call, questions, tmp_path, given):
    told = call("answers", "--data", questions, "--out", tmp_path / "a.jsonl", *given)
    assert told.code == 2
    assert "either --target or --server" in told.err


def test_a_server_needs_a_tokenizer(call, questions, tmp_path):
    told = call("answers", "--data", questions, "--out", tmp_path / "a.jsonl", "--server", "http://127.0.0.1:9")
    assert told.code == 2
    assert "--tokenizer" in told.err


def test_a_server_answers_and_an_interrupted_run_is_taken_up_again(call, folders, questions, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    refusing = [True]
    server = Scripted(lambda number, body: (401, {}) if refusing[0] and number > 9 else (200, said(body)))
    out = tmp_path / "answers.jsonl"
    words = ["answers", "--server", server.url, "--model", "tiny", "--tokenizer", folders.target, "--limit", 20,
             "--data", questions, "--out", out, "--batch_size", 3]  # fmt: skip
    try:
        told = call(*words)
        assert told.code == 2
        assert "refused with 401" in told.err.splitlines()[-1]
        assert "Traceback" not in told.err
        held = len(rows_of(out))
        assert 0 < held < 20
        refusing[0] = False
        summary = call(*words, "--json").json
    finally:
        server.close()
    assert (summary["there_already"], summary["answered"]) == (held, 20 - held)
    for row in by_key(rows_of(out)).values():
        for turn, output in zip(row.get("turns", [row.get("prompt")]), row.get("outputs", [row.get("output")])):
            assert output == turn.upper()
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert "secret" not in (tmp_path / "answers.jsonl.run.json").read_text()


def test_a_prompt_that_does_not_fit_the_context_fails_alone(call, folders, tmp_path):
    """The second turn of `two` does not fit either: its first answer is kept."""
    rows = [{"id": "long", "prompt": "x" * 600}, {"id": "one", "prompt": "who?"},
            {"id": "two", "turns": ["who?", "y" * 600]}]  # fmt: skip
    data, out = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["answers", "--target", folders.target, "--data", data, "--out", out, "--max_new_tokens", 4]
    told = call(*command, "--json")
    assert (told.json["answered"], told.json["failed"], told.json["there_already"]) == (1, 2, 0)
    assert re.search(r"question long has no answer: the prompt has \d+ tokens, but .* context ends at 512", told.err)
    found = by_key(rows_of(out))
    assert len(found["one"]["token_ids"]) == 4
    assert "error" not in found["one"]
    assert found["long"]["turns"] == ["x" * 600]
    assert (len(found["two"]["outputs"]), len(found["two"]["token_ids_by_turn"])) == (1, 1)
    assert "context ends at 512" in found["two"]["error"]
    again = call(*command)
    assert (again.code, again.out.split(" in ")[0]) == (0, "0 answers")
    assert "3 were there already" in again.out
    records = list(read_records([out], need="answers"))
    assert [(record.id, len(record.answers)) for record in records] == [("one", 1), ("two", 1)]
    data.write_text(json.dumps(rows[0]) + "\n")
    assert call(*command[:-4], "--out", tmp_path / "none.jsonl").code == 1
