"""`draftsmith report`: what a person gets from a benchmark's folder, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest


@pytest.fixture(scope="module")
def rows():
    asked = ["what does the fox say?", "the dog, the dog, the dog, the dog", "over and over and over"]
    return [{"question_id": 81 + at, "category": "qa", "turns": [text]} for at, text in enumerate(asked)]


@pytest.fixture
def run(call, folders, rows_file, rows, tmp_path):
    """A benchmark on a tiny target, with the report that it writes by itself."""
    words = ["--target", folders.target, "--data", rows_file(rows), "--max_new_tokens", 16, "--dtype", "float32"]
    drafters = f"pld,small:{folders.draft},oracle"
    told = call("bench", *words, "--drafters", drafters, "--out", tmp_path / "run", "--peers", "generate", "--json")
    assert told.code == 0, told.err
    return tmp_path / "run", told


def test_a_benchmark_writes_its_report_and_says_where(run):
    folder, told = run
    assert f"report: {folder / 'report.html'}" in told.err
    assert set(told.json["drafters"]) == {"plain", "pld", "small", "oracle", "transformers generate"}
    html = (folder / "report.html").read_text()
    assert "9 of 9 answers of the drafters and controls equal plain decoding" in html
    # Texts are taken apart with the target's own tokenizer, and drafted tokens have their colour.
    assert "not split into tokens" not in html
    assert 'class="d s' in html
    assert "what does the fox say?" in html
    assert (folder / "report.md").is_file()
    # Where each drafter runs is read from the packaged short names.
    assert html.count("<small>not measured: transformers, vLLM</small>") == 2


def test_the_command_writes_the_same_page_again_and_prints_the_verdict(run, call, tmp_path):
    folder, _ = run
    told = call("report", folder, "--out", tmp_path / "again.html")
    assert told.code == 0
    assert told.out.splitlines()[-1] == f"report: {tmp_path / 'again.html'}"
    assert "plain decoding" in told.out.splitlines()[0]
    assert (tmp_path / "again.html").read_text() == (folder / "report.html").read_text()
    assert (tmp_path / "again-speedup.svg").is_file()


def test_json_names_the_files(run, call):
    folder, _ = run
    found = call("report", folder, "--json").json
    assert found["page"] == str(folder / "report.html")
    assert found["markdown"] == str(folder / "report.md")
    assert len(found["verdicts"]) == 1
    assert all(path.endswith(".svg") for path in found["pictures"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "nowhere is not a finished run folder: it has no run.json"),
        ([], "runs"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(call, words, says):
    told = call("report", *words)
    assert told.code == 2
    assert says in told.err
    assert len(told.err.splitlines()) == 1


def test_traces_that_are_damaged_are_refused_by_name(run, call):
    folder, _ = run
    (folder / "traces" / "pld.jsonl.gz").write_bytes(b"no gzip")
    told = call("report", folder)
    assert told.code == 2
    assert "pld.jsonl.gz: cannot be read as traces" in told.err


def test_every_line_to_copy_from_the_short_names_has_its_places_filled(run):
    folder, _ = run
    for name in ("report.html", "report.md"):
        text = (folder / name).read_text()
        assert "{target}" not in text
        assert "{argument}" not in text
    run_json = json.loads((folder / "run.json").read_text())
    assert run_json["config"]["target"] in (folder / "report.md").read_text()


def test_a_run_records_its_target_so_that_another_one_is_not_compared_with_it(run, call, tmp_path):
    folder, _ = run
    facts = json.loads((folder / "run.json").read_text())
    assert len(facts["target"]["fingerprint"]) == 64
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "run.json").write_text(json.dumps(facts | {"target": facts["target"] | {"fingerprint": "0" * 64}}))
    told = call("compare", folder, other)
    assert told.code == 2
    assert "are runs of different targets" in told.err
    assert len(told.err.splitlines()) == 1
