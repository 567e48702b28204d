"""Loads of a scripted server: how many requests run at a time, what is timed, what counts."""

from __future__ import annotations

import threading
from collections import Counter
from itertools import pairwise

import pytest
from scripted_server import Scripted, streamed

from draftsmith.infer.answers.server_client import Server
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.measure.runners import Question
from draftsmith.infer.measure.served.load import check, find_model, measure, probe

QUESTIONS = [Question(number, "qa", (f"question {number}", "and then?")[: 1 + number % 2]) for number in range(6)]
PAUSE_S, WAIT_S = 0.004, 0.05


@pytest.fixture
def serve():
    running: list[Scripted] = []

    def serve(reply, page=lambda path: (404, {})) -> Scripted:
        running.append(Scripted(reply, page))
        return running[-1]

    yield serve
    for server in running:
        server.close()


def run(servers, **given):
    given = {"concurrency": [2], "warmup": 0} | given
    clients = {name: Server(one.url, "m") for name, one in servers.items()}
    return measure(clients, QUESTIONS, Settings(seed=3), 8, **given)


def test_as_many_requests_run_at_a_time_as_were_asked_for(serve):
    running, most, lock = [0], Counter(), threading.Lock()
    level = [0]

    def reply(number, body):
        def pieces():
            with lock:
                running[0] += 1
                most[level[0]] = max(most[level[0]], running[0])
            *others, last = streamed("abcd", PAUSE_S)
            yield from others
            with lock:  # before the client can know that this answer has ended
                running[0] -= 1
            yield last

        return 200, pieces()

    server = serve(reply)
    for level[0] in (1, 3):
        found = run({"server": server}, concurrency=[level[0]])
        assert not found.all_failed()
    assert most == {1: 1, 3: 3}


def test_first_and_last_piece_are_timed_and_the_usage_counts(serve):
    """The usage says 8 tokens for 16 pieces: pieces are not tokens."""
    usage = {"prompt_tokens": 5, "completion_tokens": 8, "prompt_tokens_details": {"cached_tokens": 2}}
    server = serve(lambda number, body: (200, streamed("0123456789abcdef", PAUSE_S, WAIT_S, usage)))
    found = Server(server.url, "m").stream([], Settings(seed=3, temperature=0.5, top_k=7), 8)
    assert (found.text, found.tokens, found.prompt_tokens, found.cached) == ("0123456789abcdef", 8, 5, 2)
    assert (found.stop, WAIT_S <= found.first_s) == ("stop", True)
    assert found.last_s - found.first_s >= 15 * PAUSE_S
    (body,) = server.requests
    assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})
    assert (body["temperature"], body["top_k"], body["seed"], body["max_tokens"]) == (0.5, 7, 3, 8)


def test_turns_follow_the_server_s_own_answers(serve):
    server = serve(lambda number, body: (200, streamed(body["messages"][-1]["content"].upper())))
    found = run({"server": server})
    (level,) = found.levels["server"]
    assert [turn.text for turn in level.answers[1][0].turns] == ["QUESTION 1", "AND THEN?"]
    last = next(one for one in server.requests if len(one["messages"]) == 3)
    assert [message["role"] for message in last["messages"]] == ["user", "assistant", "user"]


def test_a_failure_is_counted_and_not_sent_again(serve):
    broken = {"question 0": (429, {"error": {"message": "busy"}}), "question 2": (0, None)}
    cut = streamed("ab", usage={})

    def reply(number, body):
        text = body["messages"][0]["content"]
        if text == "question 4":
            return 200, iter([next(cut), b'data: {"error": {"message": "decoding failed"}}\n\n'])
        return broken.get(text, (200, streamed("fine")))

    server = serve(reply)
    found = run({"server": server})
    errors = {key: one.error for key, (one,) in found.levels["server"][0].answers.items() if one.error}
    assert set(errors) == {0, 2, 4}
    assert "refused with 429: busy" in errors[0]
    assert "does not answer" in errors[2]
    assert "ended the answer with an error: decoding failed" in errors[4]
    assert len(server.requests) == 6 + 3, "questions 1, 3 and 5 have a second turn"
    assert found.all_failed() == ""


def test_warm_up_asks_other_prompts_and_is_not_counted(serve):
    server = serve(lambda number, body: (200, streamed("fine")))
    found = run({"server": server}, warmup=1, concurrency=[1, 3], repeats=2)
    asked = [one["messages"][0]["content"] for one in server.requests if len(one["messages"]) == 1]
    warm = [text for text in asked if text.startswith("Warm-up")]
    assert len(warm) == 1 + 3
    assert Counter(text for text in asked if text not in warm) == {question.turns[0]: 4 for question in QUESTIONS}
    for level in found.levels["server"]:
        assert {len(several) for several in level.answers.values()} == {2}


def test_servers_take_turns_and_counters_are_read_around_each_load_alone(serve):
    order: list[str] = []
    counts = {"a": 100.0, "b": 0.0}

    def scripted(name):
        def reply(number, body):
            order.append(name)
            counts[name] += 1
            return 200, streamed("fine")

        def page(path):
            assert path == "/metrics"
            lines = {"drafts": counts[name], "draft_tokens": 3 * counts[name]}
            text = "".join(f"vllm:spec_decode_num_{what}_total {value}\n" for what, value in lines.items())
            return 200, text.encode()

        return serve(reply, page)

    found = run({"a": scripted("a"), "b": scripted("b")}, warmup=1, repeats=2, concurrency=[1, 2])
    turns = [order[0], *(one for before, one in pairwise(order) if one != before)]
    assert set(turns) == {"a", "b"}
    assert len(turns) >= 4
    for name in "ab":
        for level in found.levels[name]:
            assert level.counts.drafters()["vllm"]["steps"] == 2 * (6 + 3), "two loads of nine requests"


def test_a_server_that_does_not_count_streams_is_refused(serve):
    server = serve(lambda number, body: (200, streamed("fine", usage={})))
    with pytest.raises(ValueError, match=r"counts no tokens of streamed answers: .*include_usage"):
        probe(Server(server.url, "m"), Settings())


def test_models_that_are_not_served_are_refused(serve):
    server = serve(lambda number, body: (200, {}), lambda path: (200, {"data": [{"id": "one"}, {"id": "two"}]}))
    assert find_model(Server(server.url), "") == "one"
    assert find_model(Server(server.url), "two") == "two"
    with pytest.raises(ValueError, match="serves no model 'three', but one, two"):
        find_model(Server(server.url), "three")
    with pytest.raises(ValueError, match="lists no models"):
        find_model(Server(serve(lambda number, body: (200, {}), lambda path: (200, {"data": []})).url), "")


@pytest.mark.parametrize(
    ("questions", "concurrency", "says"),
    [
        ([], [1], "no questions"),
        (QUESTIONS[:1] * 2, [1], "occurs twice"),
        ([Question("empty", "qa", ())], [1], "'empty' has no turns"),
        (QUESTIONS, [], "names no number"),
        (QUESTIONS, [2, 2], "names a number twice"),
        (QUESTIONS, [1, 7], "--concurrency 7 needs as many questions, and --data holds 6"),
    ],
)
def test_loads_that_cannot_be_are_refused(questions, concurrency, says):
    with pytest.raises(ValueError, match=says):
        check(questions, concurrency)
