"""`draftsmith chat`: with lines from a pipe, and in a real pseudo-terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest


@pytest.fixture
def chat(call, folders, monkeypatch):
    """Give a chat these lines; what it left."""

    def chat(*lines, words=("--max_new_tokens", 10), target=True):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return call("chat", *(("--target", folders.target) if target else ()), *words)

    return chat


def test_commands_in_a_chat(chat, folders, tmp_path):
    path = tmp_path / "saved.jsonl"
    given = chat(
        "/stats", "hello", "/stats", f"/drafter small:{folders.draft}", "again", "/stats", "/colour", "more",
        f"/save {path}", "/system be a fox", f"/save {path}", "/reset", "hi", f"/save {path}", "/quit", "never read",
    )  # fmt: skip
    assert given.code == 0
    assert given.err == ""
    assert "nothing was said yet" in given.out
    assert "10 tokens" in given.out
    assert "drafter empty, accepted_length 1.00" in given.out
    assert re.search(r"drafter small, accepted_length [1-9]\.\d+", given.out)
    assert re.search(r"\x1b\[36msmall \d+\x1b\[0m", given.out)
    assert "there is nothing to save yet" in given.out
    first, second = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    assert [message["content"] for message in first[::2]] == ["hello", "again", "more"]
    assert [message["role"] for message in second] == ["system", "user", "assistant"]
    assert "never read" not in given.out


def test_json_is_the_conversation_at_the_end(chat):
    given = chat("/system a fox", "hello", words=("--max_new_tokens", 4, "--json"))
    assert [message["role"] for message in given.json["messages"]] == ["system", "user", "assistant"]


def test_wrong_commands_are_one_line_each_and_the_chat_goes_on(chat):
    given = chat("/nothing", "/drafter", "/drafter nonsense", "/save", "a " * 900, "/help", "hello", "/stats")
    lines = given.out.splitlines()
    assert lines[0] == "there is no command /nothing: see /help"
    assert "/drafter needs a drafter" in lines[1]
    assert "unknown drafter 'nonsense'" in lines[2]
    assert "/save needs the name" in lines[3]
    assert "context ends at 512" in lines[4]
    assert sum(line.startswith("/") for line in lines) == 10, "eight commands, and the two used wrongly"
    assert "10 tokens" in lines[-1]
    assert given.code == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give either --target or --server"),
        (["--target", "x", "--server", "http://x"], "give either --target or --server"),
        (["--server", "http://127.0.0.1:9"], "http://127.0.0.1:9/v1 does not answer"),
        (["--server", "127.0.0.1:9"], "must begin with http"),
        (["--server", "http://127.0.0.1:9", "--drafters", "pld"], "--drafters needs --target"),
        (["--target", "nowhere"], "nowhere does not exist"),
    ],
)
def test_wrong_input_is_one_line(chat, words, says):
    given = chat("hello", words=words, target=False)
    assert given.code == 2
    assert given.err.startswith("draftsmith chat: ")
    assert says in given.err
    assert len(given.err.splitlines()) == 1


ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A command in a pseudo-terminal."""

    def __init__(self, command):
        self.own, theirs = pty.openpty()
        self.running = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, close_fds=True,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}, preexec_fn=_control,
        )  # fmt: skip
        os.close(theirs)
        self.text = ""

    def type(self, text):
        os.write(self.own, text.encode())

    def wait_for(self, pattern, seconds=240):
        """Read until what came since the last match has a match of `pattern`."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, ESCAPES.sub("", self.text))):
            assert time.monotonic() < end, self.text
            if select.select([self.own], [], [], 0.2)[0]:
                new = os.read(self.own, 4096)
                self.text += new.decode(errors="replace")
                if b"\x1b[6n" in new:  # where is the cursor?
                    self.type("\x1b[1;1R")
        self.text = ESCAPES.sub("", self.text)[found.end() :]
        return found

    def close(self):
        self.running.kill()
        self.running.wait()
        os.close(self.own)


def _control():
    """Make the terminal the one that controls the new process, so that Ctrl-C is a signal to it."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.slow
def test_in_a_terminal_ctrl_c_stops_the_answer_and_not_the_chat(folders):
    command = [sys.executable, "-m", "draftsmith.recipes", "chat", "--target", folders.target]
    terminal = Terminal([*command, "--max_new_tokens", "480", "--temperature", "1"])
    try:
        terminal.wait_for(">")
        terminal.type("hello\r")
        terminal.wait_for(r"hello\s+\S[\s\S]{30,}")
        terminal.type("\x03")
        terminal.wait_for(r"\[stopped\]")
        terminal.wait_for(">")
        terminal.type("/stats\r")
        assert int(terminal.wait_for(r"(\d+) tokens, [\d.]+ tokens/s")[1]) < 480
        terminal.wait_for(">")
        terminal.type("\x03")
        terminal.wait_for("/quit or Ctrl-D ends the chat")
        terminal.wait_for(">")
        terminal.type("\x04")
        assert terminal.running.wait(20) == 0
    finally:
        terminal.close()
