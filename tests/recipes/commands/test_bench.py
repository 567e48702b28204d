"""`draftsmith bench`: one target, every control and peer, and what a script reads of it."""

from __future__ import annotations

import json
from pathlib import Path

import processes
import pytest

KEYS = {
    "tokens_per_s", "end_to_end_tokens_per_s", "speedup", "speedup_interval", "accepted_length", "acceptance_rate",
    "hit_rate", "nodes_per_step", "overhead", "equal", "total",
}  # fmt: skip
OURS = ("plain", "pld", "small", "empty", "oracle", "adversary")
NEW = 24


def question(number: int, *turns: str, category: str = "writing") -> dict:
    return {"question_id": number, "category": category, "turns": list(turns)}


@pytest.fixture
def bench(call, folders, rows_file):
    def bench(*words, target=folders.target, rows=None, new=NEW):
        rows = rows or [
            question(81, "what does the fox say?", "and the dog?"),
            question(82, "the dog, the dog, the dog, the dog"),
            question(83, "over and over and over", category="qa"),
        ]
        common = ["--target", target, "--data", rows_file(rows, "questions.jsonl"), "--max_new_tokens", new]
        return call("bench", *common, *words, "--json")

    return bench


def test_all_controls_and_peers_give_plain_s_answers_in_float32(bench, call, folders, tmp_path):
    drafters = f"pld,small:{folders.draft},empty,oracle,adversary"
    peers = f"generate,prompt_lookup,assistant:{folders.same_size_draft}[num_assistant_tokens=4]"
    out = tmp_path / "run"
    told = bench("--drafters", drafters, "--peers", peers, "--out", out, "--dtype", "float32").json
    found = told["drafters"]
    peer_names = {f"transformers {kind}" for kind in ("generate", "prompt_lookup", "assistant")}
    assert set(found) == {*OURS, *peer_names}
    for name, figures in found.items():
        assert set(figures) >= KEYS, name
        assert (figures["equal"], figures["total"], figures["errors"]) == (3, 3, 0), name
        assert figures["end_to_end_tokens_per_s"] > 0
        assert figures["speedup"] > 0
        assert figures["speedup_interval"] is None, "three questions"
        assert figures["ties"] == 0
    assert found["plain"]["speedup"] == 1.0
    for name in ("plain", "empty", "adversary"):
        assert found[name]["accepted_length"] == 1.0, name
    assert found["adversary"]["acceptance_rate"] == 0.0
    assert found["oracle"]["acceptance_rate"] == 1.0
    assert found["oracle"]["accepted_length"] > max(2, found["small"]["accepted_length"])
    assert found["small"]["accepted_length"] > 1.3
    assert json.loads((out / "results.json").read_text()) == told
    check_run_folder(out, set(found))
    compared = call("compare", out, out, "--require", "equal", "--json").json
    others = len(OURS) + len(peer_names) - 1
    assert (compared["equal"], compared["total"]) == (3 * others, 3 * others)
    answers = [out / "answers" / f"{name}.jsonl" for name in ("plain", "oracle")]
    pair = call("compare", *answers, "--json").json
    assert pair["speedup"] == pytest.approx(found["oracle"]["end_to_end_speedup"])


def check_run_folder(out: Path, names: set[str]) -> None:
    run = json.loads((out / "run.json").read_text())
    assert run["config"]["max_new_tokens"] == NEW
    assert run["sampling"]["temperature"] == 0.0
    assert {path.name.removesuffix(".jsonl") for path in (out / "answers").iterdir()} == names
    rows = [json.loads(line) for line in (out / "answers" / "small.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [81, 82, 83]
    assert [len(row["choices"][0]["turns"]) for row in rows] == [2, 1, 1]
    assert all(
        set(row["choices"][0]) >= {"decoding_steps", "new_tokens", "wall_time", "accept_lengths"} for row in rows
    )
    assert sum(rows[0]["choices"][0]["accept_lengths"]) == sum(rows[0]["choices"][0]["new_tokens"])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_in_bfloat16_answers_are_equal_or_the_difference_is_named_a_tie(bench, folders, batch_size):
    words = ["--drafters", f"pld,small:{folders.bfloat16}[top_k=3]", "--batch_size", batch_size]
    found = bench(*words, target=folders.bfloat16, new=64).json["drafters"]
    for name, figures in found.items():
        assert figures["equal"] + figures["ties"] == figures["total"], name
        for difference in figures["differences"]:
            assert difference["tie"] is True
            assert difference["gap"] <= 2 * difference["error"]


def test_sampled_answers_of_outright_drafters_equal_plain_s(bench, folders):
    words = ["--temperature", 0.8, "--top_p", 0.9, "--seed", 3, "--repeats", 2, "--batch_size", 2]
    peers = f"generate,assistant:{folders.same_size_draft}"
    found = bench(*words, "--drafters", f"pld,small:{folders.draft}[sample=false]", "--peers", peers).json["drafters"]
    for name in ("plain", "pld", "small"):
        assert (found[name]["equal"], found[name]["errors"]) == (3, 0), name
    for name in ("transformers generate", "transformers assistant"):
        assert (found[name]["errors"], found[name]["total"]) == (0, 3)


def test_drawn_answers_are_not_compared_and_coupled_ones_are(bench, folders):
    specs = f"drawn=small:{folders.draft}[sample=drawn],coupled=small:{folders.draft}[sample=coupled]"
    words = ["--temperature", 0.8, "--drafters", specs, "--peers", "generate"]
    found = bench(*words).json["drafters"]
    assert {name: one["drawn"] for name, one in found.items()} == {
        "plain": False, "drawn": True, "coupled": False, "transformers generate": True,
    }  # fmt: skip
    assert (found["coupled"]["equal"], found["coupled"]["total"]) == (3, 3)
    assert found["drawn"]["equal"] < 3
    greedy = bench("--drafters", f"small:{folders.draft}[sample=drawn]").json["drafters"]
    assert (greedy["small"]["drawn"], greedy["small"]["equal"]) == (False, 3)


def test_the_repetition_penalty_reaches_plain_drafters_and_peers_alike(bench, folders):
    words = ["--drafters", f"pld,small:{folders.draft}", "--peers", "generate", "--repetition_penalty", 1.4]
    found = bench(*words).json["drafters"]
    assert {name: figures["equal"] for name, figures in found.items()} == dict.fromkeys(found, 3)


def test_a_run_folder_that_holds_something_is_refused(bench, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    assert bench("--out", out, "--limit", 1, new=2).code == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    told = bench("--out", out, "--limit", 1)
    assert told.code == 2
    assert "is not empty" in told.err
    assert len(told.err.splitlines()) == 1
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_refused_run_leaves_its_folder_free_for_the_next(bench, tmp_path):
    out = tmp_path / "run"
    assert bench("--out", out, "--drafters", "pdl").code == 2
    assert bench("--out", out, "--drafters", "pld", "--limit", 1, new=2).code == 0


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_prompt_that_is_too_long_is_that_question_s_error_only(bench, folders, batch_size):
    rows = [question(1, "hello there"), question(2, "too long " * 120), question(3, "the dog, the dog")]
    words = ["--drafters", f"pld,oracle,small:{folders.draft}", "--batch_size", batch_size]
    found = bench(*words, rows=rows).json["drafters"]
    alone = bench(rows=[rows[0], rows[2]]).json["drafters"]
    for name, figures in found.items():
        assert (figures["equal"], figures["total"], figures["errors"], figures["pairs"]) == (2, 3, 1, 2), name
        (error,) = figures["error_list"]
        assert error["question_id"] == 2
        assert "context ends at 512" in error["error"]
    assert found["plain"]["tokens"] == alone["plain"]["tokens"]


def test_tables_are_printed_for_people(call, folders, rows_file):
    rows = rows_file([question(1, "hello")])
    told = call("bench", "--target", folders.target, "--data", rows, "--drafters", "pld", "--max_new_tokens", 4)
    assert told.code == 0
    assert "pld" in told.out
    assert "plain" in told.out


def test_at_80_columns_no_line_is_longer_and_no_number_is_broken(folders, rows_file, tmp_path):
    rows = [question(number, "over and over", category=f"a-task-{number % 4}") for number in range(8)]
    drafters = f"pld,oracle,a-drafter-with-a-long-name=small:{folders.draft}[top_k=3]"
    words = ["--target", folders.target, "--data", rows_file(rows), "--drafters", drafters, "--peers", "generate"]
    words += ["--max_new_tokens", 24, "--out", tmp_path / "run"]
    told = processes.run(processes.COMMAND, "bench", *words, env={"COLUMNS": "80"})
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    results = json.loads((tmp_path / "run" / "results.json").read_text())["drafters"]
    for row in results.values():
        low, high = row["speedup_interval"]
        assert f"{row['speedup']:.2f} [{low:.2f}, {high:.2f}]" in told.stdout
        assert f" {row['end_to_end_tokens_per_s']:.2f}" in told.stdout
    assert lines[0].startswith(("Use ", "No drafter pays", "Plain decoding", "Unknown", "Not known")), lines[0]
    report = (tmp_path / "run" / "report.md").read_text()
    verdict = " ".join(" ".join(lines[: lines.index("")]).split())
    assert verdict.split(". ")[0] in report.replace("\\", "")
    last = " ".join(told.stdout.rpartition("tokens/s: ")[2].split())
    for name, row in results.items():
        rate = row["tokens_per_s"] if row["speedup_of"] == "decode" else row["end_to_end_tokens_per_s"]
        assert f"{name} {rate:.2f}" in last
    assert "8/8 questions" in told.stderr
    assert "left" in told.stderr


def test_a_judge_without_room_loses_nothing(bench, folders, tmp_path, monkeypatch):
    from draftsmith.infer.measure import ties

    out = tmp_path / "run"

    def no_room(model: object) -> None:
        assert (out / "results.json").is_file(), "results are written before the copy is made"
        assert (out / "traces" / "plain.jsonl.gz").is_file()
        raise MemoryError("no room for 14 GiB")

    monkeypatch.setattr(ties, "_float32_copy", no_room)
    words = ["--drafters", f"pld,small:{folders.bfloat16}[top_k=3]", "--out", out]
    found = bench(*words, target=folders.bfloat16, new=64).json
    assert found["not_judged"] == "no room for 14 GiB"
    assert sum(row["not_judged"] for row in found["drafters"].values()) > 0
    assert json.loads((out / "results.json").read_text()) == found
    report = (out / "report.md").read_text()
    assert "were not judged: no room for 14 GiB" in report
    assert "differ from plain decoding and were not judged: a numeric tie or a bug" in report
    assert "must not be used" not in report


def test_the_exit_code_is_1_if_every_run_failed(bench, call, folders, tmp_path, rows_file):
    rows = rows_file([question(1, "too long " * 120), question(2, "too long " * 130)])
    told = call("bench", "--target", folders.target, "--data", rows, "--drafters", "pld", "--out", tmp_path / "run")
    assert told.code == 1
    assert "every run failed: ValueError: prompt 1/0 has" in told.err
    assert (tmp_path / "run" / "report.html").is_file()
