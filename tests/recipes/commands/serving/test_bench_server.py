"""`draftsmith bench --server`: against our own server with and without drafts, and against one that looks like vLLM."""

from __future__ import annotations

import json

import pytest
from running_server import MODEL, RunningServer, models
from scripted_server import Scripted, streamed

from draftsmith.infer.drafters import SmallLM

QUESTIONS = [
    {"question_id": number, "category": "qa", "turns": [f"what of fox {number}?", "and the dog?"][: 1 + number % 2]}
    for number in range(9)
]
TURNS = sum(len(row["turns"]) for row in QUESTIONS)


@pytest.fixture(scope="module")
def tiny():
    return models()


@pytest.fixture
def servers(tiny):
    """(with a draft, without one): one target."""
    model, draft, tokenizer = tiny
    with (
        RunningServer(model, tokenizer, SmallLM(draft, min_confidence=0.0)) as drafting,
        RunningServer(model, tokenizer) as plain,
    ):
        yield drafting, plain


@pytest.fixture
def bench(call, rows_file):
    def bench(*words, rows=QUESTIONS):
        return call("bench", "--data", rows_file(rows), "--max_new_tokens", 8, "--warmup", 0, *words)

    return bench


@pytest.fixture
def scripted():
    """A server that answers "fine", with the pages given by path, or functions that make them."""
    running = []

    def scripted(pages, reply=lambda number, body: (200, streamed("fine"))):
        pages = {"/v1/models": (200, {"data": [{"id": "m"}]})} | pages

        def page(path):
            found = pages.get(path, (404, {}))
            return found() if callable(found) else found

        running.append(Scripted(reply, page))
        return running[-1].url

    yield scripted
    for one in running:
        one.close()


def test_our_own_server_with_and_without_drafts(bench, call, servers, tmp_path):
    drafting, plain = servers
    out = tmp_path / "run"
    words = ["--server", drafting.url, "--plain_server", f"{plain.url}/v1", "--concurrency", "1,4", "--out", out]
    results = bench(*words, "--json").json
    assert json.loads((out / "results.json").read_text()) == results
    assert {name: one["kind"] for name, one in results["servers"].items()} == dict.fromkeys(
        ("server", "plain"), "draftsmith"
    )
    assert [level["concurrency"] for level in results["levels"]] == [1, 4]
    for level in results["levels"]:
        ours, other = level["servers"]["server"], level["servers"]["plain"]
        for found in (ours, other):
            assert (found["errors"], found["requests"], found["tokens"]) == (0, TURNS, other["tokens"])
            assert found["others_tokens"] == 0, "the server counts as many tokens as the answers have"
            assert 0 < found["ttft_p50_s"] <= found["ttft_p95_s"] < found["answer_p95_s"]
            assert found["tpot_p50_s_interval"][0] <= found["tpot_p50_s"] <= found["tpot_p50_s_interval"][1]
            assert found["in_flight"] == pytest.approx(level["concurrency"], rel=0.35)
        assert list(ours["drafters"]) == ["small"]
        assert ours["accepted_length"] == ours["drafters"]["small"]["accepted_length"] > 1.3
        assert (other["drafters"], other["accepted_length"]) == ({}, None)
        assert (ours["equal"], ours["total"]) == (9, 9), "float64: drafts change no text"
        assert ours["speedup_interval"][0] < ours["speedup"] < ours["speedup_interval"][1]
    assert drafting.idle()
    assert plain.idle()
    check_folder(out, call, drafting.url)


def check_folder(out, call, url):
    facts = json.loads((out / "run.json").read_text())
    assert facts["config"]["server"] == url
    assert "batch_size" not in facts["config"]
    names = {path.name for path in (out / "answers").iterdir()}
    assert len(names) == 4
    pair = [out / "answers" / f"{name}, 4 at once.jsonl" for name in ("plain", "server")]
    compared = call("compare", *map(str, pair), "--json").json
    assert (compared["equal"], compared["total"]) == (9, 9)
    report = call("report", out, "--json").json
    assert report["verdicts"][0].startswith(f"{MODEL} (Draftsmith): ")
    page, marked = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert "<script" not in page
    assert page.count("<svg") > 3
    for text in ("server: small", "accepted_length", "TTFT p95 ms", "speedup"):
        assert text in page
        assert text in marked
    assert [path.split("-")[-1] for path in report["pictures"]] == ["speed.svg", "ttft.svg", "tpot.svg"]


def test_two_runs_of_servers_are_one_report_and_not_with_another_kind_of_run(bench, call, scripted, tmp_path):
    url = scripted({})
    for name in ("one", "two"):
        done = bench("--server", url, "--concurrency", "1", "--out", tmp_path / name)
        assert done.code == 0, done.err
    found = call("report", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "both.html", "--json").json
    assert [line.partition(":")[0] for line in found["verdicts"]] == ["one", "two"]
    assert "two server" in (tmp_path / "both.html").read_text()
    (tmp_path / "three").mkdir()
    for name in ("run.json", "results.json"):
        (tmp_path / "three" / name).write_text("{}")
    mixed = call("report", tmp_path / "one", tmp_path / "three")
    assert mixed.code == 2
    assert "three is not about a server" in mixed.err
    again = bench("--server", url, "--concurrency", "1", "--out", tmp_path / "one")
    assert (again.code, "is not empty" in again.err) == (2, True)


def test_at_80_columns_people_read_figures_and_the_acceptance_of_vllm(bench, scripted, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    asked = [0]

    def reply(number, body):
        asked[0] += 1
        return 200, streamed("a longer text than that")

    def metrics():
        lines = {"num_drafts": 7, "num_draft_tokens": 21, "num_accepted_tokens": 10.5}
        text = "".join(f"vllm:spec_decode_{name}_total {one * asked[0]}\n" for name, one in lines.items())
        return 200, text.encode()

    words = ["--server", scripted({"/metrics": metrics}, reply), "--concurrency=1,4,9", "--warmup", 1]
    done = bench(*words)
    assert done.code == 0
    assert max(map(len, done.out.splitlines())) <= 80
    assert done.out.startswith("m (vLLM): tokens/s ")
    assert "server: vllm" in done.out
    assert " 2.50 " in done.out
    assert " 50.0% " in done.out
    assert "27/27 questions, server, 9 at a time" in done.err


def test_failed_requests_are_counted_and_if_all_fail_the_exit_code_is_1(bench, servers, rows_file):
    _, plain = servers
    rows = [*QUESTIONS, {"question_id": 99, "category": "qa", "turns": ["too long " * 120]}]
    done = bench("--server", plain.url, "--concurrency", "2", rows=rows)
    assert done.code == 0
    assert "question 99: " in done.out
    (level,) = bench("--server", plain.url, "--concurrency", "2", "--json", rows=rows).json["levels"]
    assert (level["servers"]["server"]["errors"], level["servers"]["server"]["requests"]) == (1, TURNS)
    done = bench("--server", plain.url, "--concurrency", "1", rows=rows[-1:])
    assert done.code == 1
    assert "every request failed: " in done.err.splitlines()[-1]


def test_a_key_is_read_from_its_file(bench, tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    model, _, tokenizer = tiny
    key = tmp_path / "key"
    key.write_text("s3cr3t-key\n")
    words = ["--concurrency", "1", "--limit", 1]
    with RunningServer(model, tokenizer, keys=["s3cr3t-key"]) as server:
        refused = bench("--server", server.url, *words)
        assert refused.code == 2
        assert "refused with 401: the API key is missing or wrong; --api_key_file gives the key" in refused.err
        out = tmp_path / "run"
        assert bench("--server", server.url, *words, "--api_key_file", key, "--out", out).code == 0
    assert not any("s3cr3t" in path.read_text() for path in out.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give either --target or --server"),
        (["--server", "http://127.0.0.1:9", "--target", "x"], "give either --target or --server"),
        (["--server", "127.0.0.1:9"], "must begin with http"),
        (["--server", "http://127.0.0.1:9", "--concurrency", "1"], "http://127.0.0.1:9/v1 does not answer: "),
        (["--server", "http://127.0.0.1:9", "--drafters", "pld", "--batch_size", 2], "--drafters, --batch_size: with"),
        (["--server", "http://a", "--plain_server", "http://a/v1/"], "--plain_server is --server"),
        (["--server", "http://127.0.0.1:9", "--concurrency", "99"], "needs as many questions, and --data holds 9"),
        (["--server", "http://127.0.0.1:9", "--concurrency", "0"], "each a whole number of at least 1"),
        (["--server", "http://127.0.0.1:9", "--api_key_file", "/no/such/file"], "/no/such/file"),
        (["--target", "x", "--concurrency", "1"], "--concurrency: with --server only"),
        (["--target", "x", "--model", "m", "--api_key_file", "k"], "--model, --api_key_file: with --server only"),
    ],
)
def test_wrong_input_is_one_line(bench, words, says):
    given = bench(*words)
    assert given.code == 2
    (line,) = given.err.splitlines()
    assert line.startswith("draftsmith bench: ")
    assert says in line
    assert given.out == ""


@pytest.mark.parametrize(
    ("pages", "reply", "words", "says"),
    [
        ({}, (200, {}), ["--model", "other"], "serves no model 'other', but m: see --model"),
        ({"/v1/models": (200, {"data": []})}, (200, {}), [], "lists no models"),
        ({}, (404, {"error": "there is no model"}), [], "refused with 404: there is no model"),
        ({}, (200, b'data: {"choices": []}\n\ndata: [DONE]\n\n'), [], "counts no tokens of streamed answers"),
        ({}, (200, {"choices": [{"message": {"content": "whole"}}]}), [], "counts no tokens of streamed answers"),
        ({}, (200, b"data: {oops\n\n"), [], "broke off the answer"),
        ({}, (200, b'data: {"choices": [3]}\n\n'), [], "a stream that is not OpenAI-compatible"),
        ({}, (200, b'data: {"choices": [], "usage": [4]}\n\n'), [], "a stream that is not OpenAI-compatible"),
        ({}, (200, b"data: [1]\n\n"), [], "is not OpenAI-compatible"),
    ],
)
def test_servers_that_cannot_be_measured_are_refused_in_one_line(bench, scripted, tmp_path, pages, reply, words, says):
    out = tmp_path / "run"
    given = bench("--server", scripted(pages, lambda number, body: reply), *words, "--concurrency", "1", "--out", out)
    assert given.code == 2
    (line,) = given.err.splitlines()
    assert says in line
    assert not out.exists()
