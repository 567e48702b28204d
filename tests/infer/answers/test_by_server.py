"""Answers from a server: token ids, retries, malformed answers, resuming."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from running_server import MODEL, RunningServer, models
from scripted_server import Scripted, said

from draftsmith.infer.answers import server_client
from draftsmith.infer.answers.answer_file import AnswerFile, KeyedRecord
from draftsmith.infer.answers.by_server import answer_through
from draftsmith.infer.answers.server_client import Server
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.text.record import Message, Record
from draftsmith.infer.text.templates import find_template

CONFIG = {"target": "t", "seed": 0}


def asked(*turns: str, key: str = "1", system: str = "") -> KeyedRecord:
    messages = [Message("system", system)] if system else []
    return KeyedRecord(key, Record(key, "qa", messages=[*messages, *(Message("user", turn) for turn in turns)]))


@pytest.fixture
def serve(monkeypatch) -> Iterator[Callable[..., Scripted]]:
    monkeypatch.setattr(server_client, "WAIT_S", 0.01)
    running: list[Scripted] = []

    def serve(reply: Callable[[int, dict[str, Any]], tuple[int, Any]]) -> Scripted:
        running.append(Scripted(reply))
        return running[-1]

    yield serve
    for server in running:
        server.close()


@pytest.fixture
def through(folders, tmp_path):
    """Answer `records` through a server; returns the rows by key."""
    template = find_template("chat", folders.tokenizer)
    path = tmp_path / "answers.jsonl"

    def through(server: Scripted, *records: KeyedRecord, url: str = "", concurrency: int = 2) -> dict[str, Any]:
        client = Server(url or server.url, "tiny", api_key="k")
        with AnswerFile(path, CONFIG) as out:
            answer_through(client, records, template, Settings(seed=4), 9, out, concurrency=concurrency)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len({row["question_id"] for row in rows}) == len(rows)
        return {row["question_id"]: row for row in rows}

    return through


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_the_server_s_own_token_ids_are_kept(serve, through, suffix):
    server = serve(lambda number, body: (200, said(body, token_ids=[9, 8, 3]) | {"prompt_token_ids": [5, 6]}))
    row = through(server, asked("one", system="be brief"), url=server.url + suffix)["1"]
    assert (row["token_ids"], row["prompt_token_ids"], row["token_ids_from"]) == ([9, 8, 3], [5, 6], "server")
    assert (row["prompt"], row["output"], row["category"], row["stop"]) == ("one", "ONE", "qa", "stop")
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    assert row["sampling"] == {"temperature": 0.0, "seed": 4}
    (request,) = server.requests
    assert request["path"] == "/v1/chat/completions"
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    assert (request["model"], request["max_tokens"], request["temperature"], request["seed"]) == ("tiny", 9, 0.0, 4)
    assert server.headers[0]["Authorization"] == "Bearer k"


def test_without_token_ids_those_of_the_text_are_kept_and_the_row_says_so(serve, through, folders):
    server = serve(lambda number, body: (200, said(body)))
    row = through(server, asked("one", "two", "three"))["1"]
    assert row["token_ids_from"] == "text"
    assert row["outputs"] == ["ONE", "TWO", "THREE"]
    assert row["turns"] == ["one", "two", "three"]
    decoded = [folders.tokenizer.decode(ids) for ids in row["token_ids_by_turn"]]
    assert decoded == ["ONE<|end|>", "TWO<|end|>", "THREE<|end|>"]
    last = server.requests[-1]["messages"]
    assert [message["content"] for message in last] == ["one", "ONE", "two", "TWO", "three"]


def test_an_answer_cut_at_its_limit_gets_no_end_token(serve, through, folders):
    server = serve(lambda number, body: (200, said(body, finish_reason="length")))
    row = through(server, asked("one"))["1"]
    assert folders.tokenizer.decode(row["token_ids"]) == "ONE"


def test_a_busy_server_is_asked_again(serve, through):
    server = serve(lambda number, body: (503, {"error": "busy"}) if number <= 2 else (200, said(body)))
    assert through(server, asked("one"))["1"]["output"] == "ONE"
    assert len(server.requests) == 3


def test_a_connection_that_breaks_is_tried_again(serve, through):
    server = serve(lambda number, body: (0, None) if number <= 2 else (200, said(body)))
    assert through(server, asked("one"))["1"]["output"] == "ONE"


def test_a_refusal_is_told_at_once_in_one_line(serve, through):
    server = serve(lambda number, body: (401, {"error": "wrong key"}))
    with pytest.raises(ValueError, match=r"refused with 401: .*wrong key"):
        through(server, asked("one"))
    assert len(server.requests) == 1


GARBAGE: dict[str, Any] = {
    "html": b"<html>not found</html>",
    "bytes": b"\xff\xfe\x00\x01",
    "list": [1, 2],
    "text": "hello",
    "no choices": {"object": "chat.completion"},
    "empty choices": {"choices": []},
    "content": {"choices": [{"message": {"content": 5}}]},
    "token ids": {"choices": [{"message": {"content": "x"}, "token_ids": ["a"]}]},
    "negative": {"choices": [{"message": {"content": "x"}, "token_ids": [-1]}]},
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_a_clear_line_and_no_row(serve, through, kind, tmp_path):
    server = serve(lambda number, body: (200, GARBAGE[kind]))
    with pytest.raises(ValueError, match=r"sent an answer"):
        through(server, asked("one"))
    assert (tmp_path / "answers.jsonl").read_bytes() == b""


def test_an_answer_without_content_is_an_empty_one(serve, through):
    server = serve(lambda number, body: (200, {"choices": [{"message": {"content": None}, "finish_reason": "length"}]}))
    assert through(server, asked("one"))["1"]["output"] == ""


def test_no_server_is_told_in_one_line(through, serve):
    server = serve(lambda number, body: (200, said(body)))
    server._http.server_close()
    with pytest.raises(ValueError, match="does not answer"):
        through(server, asked("one"))
    with pytest.raises(ValueError, match="must begin with http"):
        through(server, asked("one"), url="localhost:80")


def test_an_interrupted_run_asks_only_for_what_is_missing(serve, through):
    records = [asked(f"question {i}", key=str(i)) for i in range(12)]
    broken = serve(lambda number, body: (200, said(body)) if number <= 5 else (403, {}))
    with pytest.raises(ValueError, match="403"):
        through(broken, *records)
    whole = serve(lambda number, body: (200, said(body)))
    rows = through(whole, *records)
    assert {key: row["output"] for key, row in rows.items()} == {str(i): f"QUESTION {i}" for i in range(12)}
    assert 7 <= len(whole.requests) <= 9


def test_a_prompt_that_is_already_rendered_is_refused_because_the_server_would_wrap_it(serve, through):
    server = serve(lambda number, body: (200, said(body, token_ids=[9])))
    with pytest.raises(ValueError, match=r"already rendered \(vicuna\), and a server wraps every prompt"):
        through(server, asked("who?", key="a"), asked("USER: who? ASSISTANT:", key="b"))


# What servers say of a prompt that does not fit, and a refusal that has to end the run.
BEYOND = {
    "ours": (400, {"error": {"message": "the prompt has 9 tokens", "code": "context_length_exceeded"}}),
    "vllm": (400, {"error": {"message": "This model's maximum context length is 8 tokens. However, ...", "code": 400}}),
    "vllm prompt": (400, {"message": "The prompt (length 9) is longer than the maximum model length of 8."}),
    "sglang": (400, {"message": "The input (9 tokens) is longer than the model's context length (8 tokens)."}),
    "llama.cpp": (400, {"error": {"message": "the request exceeds the available context size (8 tokens)"}}),
    "tgi": (422, {"error": "Input validation error: `inputs` must have less than 8 tokens. Given: 9"}),
    "body": (413, {"error": {"message": "the body is larger than 8 bytes"}}),
}


@pytest.mark.parametrize("kind", BEYOND)
def test_a_prompt_beyond_the_context_is_its_row_s_error_and_no_other_s(serve, through, kind):
    def reply(number, body):
        return BEYOND[kind] if body["messages"][-1]["content"] == "long" else (200, said(body, token_ids=[9]))

    server = serve(reply)
    rows = through(server, asked("long", key="a"), asked("one", key="b"), asked("two", "long", "three", key="c"))
    assert rows["a"]["turns"] == ["long"]
    assert set(rows["a"]) == {"question_id", "category", "error", "turns"}
    assert rows["b"]["output"] == "ONE"
    assert (rows["c"]["outputs"], rows["c"]["turns"]) == (["TWO"], ["two", "long"])
    assert rows["c"]["token_ids_from"] == "server"
    for key in "ac":
        assert f"refused with {BEYOND[kind][0]}: " in rows[key]["error"]
    assert len(server.requests) == 4, "neither retried nor asked on"


@pytest.mark.parametrize(
    "refusal", [(400, {"error": "unknown field top_k"}), (422, {"error": "bad"}), (401, {"error": "context length"})]
)
def test_another_refusal_ends_the_run(serve, through, refusal, tmp_path):
    with pytest.raises(ValueError, match=f"refused with {refusal[0]}"):
        through(serve(lambda number, body: refusal), asked("one"))
    assert (tmp_path / "answers.jsonl").read_bytes() == b""


def test_our_own_server_refuses_one_prompt_and_answers_the_others(tmp_path):
    model, _, tokenizer = models()
    template = find_template("chat", tokenizer)
    path = tmp_path / "answers.jsonl"
    records = [asked("too long " * 120, key="a"), asked("who?", key="b"), asked("who?", "x " * 400, key="c")]
    with RunningServer(model, tokenizer, body_bytes=4 << 10) as running, AnswerFile(path, CONFIG) as out:
        records.append(asked("y" * (5 << 10), key="d"))
        answer_through(Server(running.url, MODEL), records, template, Settings(), 6, out)
        assert set(out.errors) == {"a", "c", "d"}
        assert running.idle()
    rows = {row["question_id"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert "context of 512 must hold the answer too" in rows["a"]["error"]
    assert (len(rows["b"]["token_ids"]), rows["b"]["token_ids_from"]) == (6, "server")
    assert rows["c"]["outputs"] == [rows["b"]["output"]]
    assert "body is larger than 4096 bytes" in rows["d"]["error"]
