"""FastChat's own controller lists this server, and FastChat's OpenAI server answers through it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from itertools import pairwise

import pytest
from running_server import MODEL, RunningServer, until

from draftsmith.infer.serving.app import OpenAIApp
from draftsmith.infer.serving.fastchat_worker import FastChatWorker
from draftsmith.infer.serving.requests import ChatMessage

HELLO = [{"role": "system", "content": "a fox"}, {"role": "user", "content": "what does {it} say?"}]


def post(url, content):
    asked = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as response:
        return response.read()


@pytest.fixture
def worker(tiny):
    model, _, tokenizer = tiny
    make = lambda app, url: FastChatWorker(app, "http://127.0.0.1:9", url)  # noqa: E731
    with RunningServer(model, tokenizer, worker=make) as server:
        yield server


def rendered(conversation, messages):
    """As FastChat renders a conversation in the style that the worker names."""
    from fastchat.conversation import Conversation

    made = Conversation(**{**conversation, "messages": []})
    for message in messages:
        if message["role"] == "system":
            made.set_system_message(message["content"])
        else:
            made.append_message(made.roles[message["role"] == "assistant"], message["content"])
    made.append_message(made.roles[1], None)
    return made.get_prompt()


def test_chats_that_fastchat_renders_become_the_targets_own_prompts(worker):
    conversation = json.loads(post(f"{worker.url}/worker_get_conv_template", {}))["conv"]
    longer = [*HELLO, {"role": "assistant", "content": "ring\nding"}, {"role": "user", "content": "again"}]
    for messages in (HELLO, HELLO[1:], longer):
        found = worker.worker._messages(rendered(conversation, messages))
        assert found == [ChatMessage(**message) for message in messages]
        wanted = worker.target.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        count = post(f"{worker.url}/count_token", {"prompt": rendered(conversation, messages)})
        assert json.loads(count)["count"] == len(wanted)
    assert worker.worker._messages("a text of one's own") == []


def test_a_stream_ends_with_its_whole_text_and_errors_have_fastchats_codes(worker):
    asked = {"prompt": "the quick", "temperature": 0, "max_new_tokens": 10**6, "top_k": -1, "stop": []}
    parts = post(f"{worker.url}/worker_generate_stream", asked).split(b"\0")
    assert parts.pop() == b""
    found = [json.loads(part) for part in parts]
    whole = json.loads(post(f"{worker.url}/worker_generate", asked))
    assert found[-1]["text"] == whole["text"]
    assert found[-1]["finish_reason"] == whole["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == worker.rows.max_new_tokens
    assert all(later["text"].startswith(one["text"]) for one, later in pairwise(found))
    for changes, code in (({"presence_penalty": 1.0}, 40001), ({"prompt": "a " * 900}, 40303), ({"prompt": 3}, 40001)):
        for route in ("worker_generate", "worker_generate_stream"):
            (text,) = filter(None, post(f"{worker.url}/{route}", asked | changes).split(b"\0"))
            assert json.loads(text)["error_code"] == code
    until(worker.idle)


def test_a_controller_that_does_not_answer_is_an_error(worker):
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:9 does not answer"), worker.worker.registered():
        pass
    with pytest.raises(ValueError, match="must begin with http"):
        FastChatWorker(OpenAIApp(worker.thread, worker.rows, MODEL), "localhost:21001", worker.url)


@contextmanager
def fastchat(tmp_path, module, *words):
    """A process of FastChat's on a free port; its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", f"fastchat.serve.{module}", "--host", "127.0.0.1", "--port", str(port), *words]
    with (tmp_path / f"{module}.out").open("wb") as out:
        running = subprocess.Popen(
            command, cwd=tmp_path, stdout=out, stderr=out, env=os.environ | {"LOGDIR": str(tmp_path)}
        )
        try:
            yield f"http://127.0.0.1:{port}", running
        finally:
            running.terminate()
            running.wait(20)


def answers(url, running):
    assert running.poll() is None, "FastChat's process has ended"
    with suppress(urllib.error.URLError, ConnectionError):
        urllib.request.urlopen(url, timeout=5).close()
        return True
    return False


@pytest.mark.slow
def test_fastchats_controller_lists_the_worker_and_its_openai_server_answers_through_it(tiny, tmp_path):
    model, _, tokenizer = tiny
    with fastchat(tmp_path, "controller") as (controller, first):
        until(lambda: answers(f"{controller}/test_connection", first), 120)
        with (
            RunningServer(model, tokenizer, worker=lambda app, url: FastChatWorker(app, controller, url)) as server,
            server.worker.registered(),
            fastchat(tmp_path, "openai_api_server", "--controller-address", controller) as (api, second),
        ):
            assert json.loads(post(f"{controller}/list_models", {}))["models"] == [MODEL]
            until(lambda: answers(f"{api}/v1/models", second), 120)
            with urllib.request.urlopen(f"{api}/v1/models", timeout=60) as response:
                assert [one["id"] for one in json.load(response)["data"]] == [MODEL]
            asked = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_tokens": 12}
            through = json.loads(post(f"{api}/v1/chat/completions", asked))
            direct = json.loads(post(f"{server.url}/v1/chat/completions", asked))
            assert through["choices"][0]["message"]["content"] == direct["choices"][0]["message"]["content"]
            assert through["usage"]["prompt_tokens"] == direct["usage"]["prompt_tokens"]
            text = json.loads(post(f"{api}/v1/completions", {"model": MODEL, "prompt": "the quick", "max_tokens": 5}))
            assert text["usage"]["completion_tokens"] == 5
