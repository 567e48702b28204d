"""`draftsmith bench` killed in the middle and run again: no question is lost or doubled."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import processes
import pytest

QUESTIONS = 5
UNFINISHED = "unfinished.jsonl"


@pytest.fixture
def words(folders, rows_file, tmp_path):
    asked = [
        {"question_id": number, "category": "qa", "turns": [f"tell me about {number}", "and then?"][: 1 + number % 2]}
        for number in range(QUESTIONS)
    ]
    words = ["bench", "--target", folders.target, "--data", rows_file(asked, "asked.jsonl"), "--dtype", "float32"]
    words += ["--max_new_tokens", 16, "--repeats", 2, "--drafters", "pld,adversary", "--out", tmp_path / "run"]
    return [str(word) for word in words]


def killed_after(visits: int, words: list[str], out: Path) -> None:
    """Run the command in a process of its own and kill -9 it once `visits` groups are on disk."""
    process = processes.Started(processes.COMMAND, *words)
    path = out / UNFINISHED
    while process.poll() is None:
        if path.is_file() and path.read_bytes().count(b"\n") >= visits:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    assert process.wait(60) == -signal.SIGKILL, process.stderr
    assert path.is_file(), "the run had ended before it was killed"


def test_a_killed_run_goes_on_where_it_stopped(words, call, tmp_path):
    out = tmp_path / "run"
    killed_after(3, words, out)
    before = (out / UNFINISHED).read_bytes().splitlines()
    whole = [line for line in before if line.endswith(b"}")]
    assert 3 <= len(whole) < 2 * QUESTIONS
    told = call("report", out)
    assert told.code == 2
    assert "same `draftsmith bench` command again" in told.err
    # A kill in the middle of a write leaves half a line.
    with (out / UNFINISHED).open("ab") as file:
        file.write(before[-1][: len(before[-1]) // 2])

    assert call(*words).code == 0
    run = json.loads((out / "run.json").read_text())
    assert [one["visits"] for one in run["resumed"]] == [len(whole)]
    assert not (out / UNFINISHED).exists()
    assert (out / "report.html").is_file()
    for name in ("plain", "pld", "adversary"):
        rows = [json.loads(line) for line in (out / "answers" / f"{name}.jsonl").read_text().splitlines()]
        assert [row["question_id"] for row in rows] == list(range(QUESTIONS))
        assert [len(row["choices"]) for row in rows] == [2] * QUESTIONS
    # What was measured before the kill is in the results unchanged, plain and drafters of a question together.
    first = json.loads(whole[0])
    assert set(first) == {"plain", "pld", "adversary"}
    kept = json.loads((out / "answers" / "plain.jsonl").read_text().splitlines()[0])
    assert kept["choices"][0]["wall_time"] == [turn["wall_s"] for turn in first["plain"][0]["turns"]]
    results = json.loads((out / "results.json").read_text())
    assert {row["equal"] for row in results["drafters"].values()} == {QUESTIONS}

    again = call(*words)
    assert again.code == 2
    assert "is not empty" in again.err


def test_a_run_of_other_settings_is_not_resumed_and_two_processes_do_not_write_one_run(words, call, tmp_path):
    import fcntl

    out = tmp_path / "run"
    killed_after(1, words, out)
    held = (out / UNFINISHED).read_bytes()
    for change in (["--seed", "7"], ["--drafters", "pld"], ["--limit", "2"]):
        told = call(*words, *change)
        assert told.code == 2
        assert f"{change[0][2:]} was" in told.err
        assert len(told.err.splitlines()) == 1
    asked = Path(words[words.index("--data") + 1])
    rows = asked.read_text()
    asked.write_text(rows.replace("about 3", "about 33"))
    assert "the questions have changed" in call(*words).err
    asked.write_text(rows)
    with (out / UNFINISHED).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process" in call(*words).err
    assert (out / UNFINISHED).read_bytes() == held
    assert call(*words, "--json").code == 0
