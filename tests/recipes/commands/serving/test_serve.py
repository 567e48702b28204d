"""`draftsmith serve`: wrong input is refused before a model is loaded; signals, with the real process."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager

import openai
import pytest


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--target", "nowhere"], "nowhere does not exist"),
        (["--drafters", "pld,empty"], "takes one drafter"),
        (
            ["--drafters", "pld", "--learn"],
            "that learn from answers, such as rest, not for pld",
        ),
        (["--learn"], "not for none"),
        (["--port", "70000"], "--port must lie between 0 and 65535, not 70000"),
        (["--host", "no such host"], "--host no such host"),
        (["--api_key", "/no/such/file"], "there is no such file"),
        (["--controller", "http://127.0.0.1:9", "--api_key", "k"], "leave out --api_key, or --controller"),
        (["--controller", "127.0.0.1:9"], "must begin with http"),
        (["--controller", "http://127.0.0.1:9"], "does not answer"),
        (["--batch_size", "0"], "--batch_size takes a whole number of at least 1"),
        (["--queue_s", "0"], "--queue_s takes a number above 0"),
        (["--template", "chatt"], "did you mean chat"),
    ],
)
def test_wrong_input_is_one_line(call, folders, words, says):
    given = call("serve", "--target", folders.target, "--port", 0, *words)
    assert given.code == 2
    (*_, line) = given.err.splitlines()
    assert line.startswith("draftsmith serve: ")
    assert says in line
    assert given.out == ""


def test_a_port_that_is_taken_is_refused(call, folders):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        given = call("serve", "--target", folders.target, "--port", port)
    assert given.code == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use; try another --port" in given.err


def test_an_empty_file_of_keys_is_refused(call, folders, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("\n\n")
    given = call("serve", "--target", folders.target, "--api_key", keys)
    assert given.code == 2
    assert "holds no key" in given.err


@contextmanager
def serving(folders, *words, key="none"):
    """The command as a process, and its client."""
    command = [sys.executable, "-m", "draftsmith.recipes", "serve", "--target", folders.target, "--port", "0"]
    command += ["--max_new_tokens", "480", *map(str, words)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as running:
        try:
            lines = []
            for line in running.stderr:
                lines.append(line)
                if found := re.search(r"serving target on (\S+)", line):
                    break
            else:
                pytest.fail("".join(lines))
            with openai.OpenAI(base_url=found[1], api_key=key, max_retries=0) as client:
                for _ in range(200):
                    try:
                        client.models.list()
                        break
                    except openai.APIConnectionError:
                        time.sleep(0.05)
                yield running, client
        finally:
            running.kill()


def ask(client, **fields):
    fields = {"max_tokens": 400, "temperature": 1.0, "seed": 1} | fields
    return client.completions.create(model="target", prompt="the quick", extra_body={"stop_token_ids": []}, **fields)


@pytest.mark.slow
def test_sigterm_finishes_what_runs_and_refuses_what_is_new(folders):
    with serving(folders, "--batch_size", 1) as (running, client):
        wanted = ask(client).choices[0].text
        stream = ask(client, stream=True)
        said = [next(stream).choices[0].text]
        waiting = []
        second = threading.Thread(target=lambda: waiting.append(ask(client)))
        second.start()
        time.sleep(0.2)
        running.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(openai.APIConnectionError):
            ask(client.with_options(timeout=5))
        said += [chunk.choices[0].text for chunk in stream]
        second.join()
        assert "".join(said) == waiting[0].choices[0].text == wanted
        assert running.wait(20) == 0
        assert "SIGTERM: finishing what runs" in running.stderr.read()


@pytest.mark.slow
def test_a_second_sigterm_ends_at_once_with_an_error(folders):
    with serving(folders, "--drafters", "pld") as (running, client):
        stream = ask(client, stream=True, max_tokens=480)
        next(stream)
        running.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        running.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError):
            for _ in stream:
                pass
        assert running.wait(20) == 1
        assert "ending at once" in running.stderr.read()


@pytest.mark.slow
def test_over_two_ranks_sigterm_finishes_what_runs(folders, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with serving(folders, "--drafters", "pld") as (_, client):
        wanted = ask(client).choices[0].text
    with serving(folders, "--drafters", "pld", "--tp", 2) as (running, client):
        assert ask(client).choices[0].text == wanted
        stream = ask(client, stream=True)
        said = [next(stream).choices[0].text]
        running.send_signal(signal.SIGTERM)
        said += [chunk.choices[0].text for chunk in stream]
        assert "".join(said) == wanted
        assert running.wait(20) == 0
        assert running.stderr.read() == "SIGTERM: finishing what runs; again to end at once\n"


@pytest.mark.slow
@pytest.mark.parametrize("busy", [True, False])
def test_a_server_ends_with_a_rank_that_is_killed(folders, busy, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with serving(folders, "--tp", 2) as (running, client):
        stream = ask(client, stream=True, max_tokens=480)
        for _ in range(1 if busy else 480):
            next(stream, None)
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(running.pid)], capture_output=True, text=True)
        os.kill(int(children.stdout), signal.SIGKILL)
        assert running.wait(10) == 1
        assert running.stderr.read() == "draftsmith: the target is gone: rank 1 was ended by signal 9 (SIGKILL)\n"


@pytest.mark.slow
def test_after_kill_9_clients_get_an_error_at_once_and_the_next_start_serves(folders):
    with serving(folders) as (running, client):
        stream = ask(client, stream=True, max_tokens=480)
        next(stream)
        began = time.monotonic()
        running.kill()
        with pytest.raises(openai.APIConnectionError):
            for _ in stream:
                pass
        assert time.monotonic() - began < 5
    with serving(folders) as (_, client):
        assert ask(client, max_tokens=3).usage.completion_tokens == 3


@pytest.mark.slow
def test_rest_learns_from_answers_as_they_finish_if_asked_to(folders):
    drafted = {}
    for words in ([], ["--learn"]):
        with serving(folders, "--drafters", "rest", *words) as (_, client):
            assert len({ask(client, max_tokens=60).choices[0].text for _ in range(4)}) == 1
            url = str(client.base_url).removesuffix("/v1/")
            with urllib.request.urlopen(f"{url}/metrics") as response:
                text = response.read().decode()
        drafted[bool(words)] = float(re.search(r'draftsmith_accepted_length{drafter="rest"} (\S+)', text)[1])
    assert drafted[True] > 2 * drafted[False]


@pytest.mark.slow
def test_keys_are_read_from_a_file(folders, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")
    with serving(folders, "--api_key", keys, key="two") as (_, client):
        with pytest.raises(openai.AuthenticationError):
            ask(client.with_options(api_key="three"), max_tokens=1)
        assert ask(client, max_tokens=1).usage.completion_tokens == 1
        url = str(client.base_url).removesuffix("/v1/")
        with urllib.request.urlopen(f"{url}/health") as response:
            assert json.load(response)["model"] == "target"
