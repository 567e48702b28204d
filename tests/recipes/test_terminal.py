"""What is written where a person looks on, and what in a file or a pipe: colours and progress."""

import json
import os
import pty
import re
import select

import processes
import pytest


def on_a_terminal(program, **env):
    """What a Python program writes where standard output and error are a terminal."""
    ours, theirs = pty.openpty()
    env = {"NO_COLOR": None, "FORCE_COLOR": None, "TERM": "xterm-256color", **env}
    process = processes.Started(program, env=env, terminal=os.ttyname(theirs))
    seen = b""
    while process.poll() is None or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.05)[0]:
            seen += os.read(ours, 4096)
    os.close(theirs)
    os.close(ours)
    assert process.wait() == 0, seen.decode()
    return seen.decode()


COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def program(folders, tmp_path_factory):
    """A program that prints a conversation with its loss mask."""
    data = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "hello", "output": "over the lazy dog"}) + "\n")
    words = ["data", str(data), "--tokenizer", str(folders.target)]
    return f"from draftsmith.recipes.cli.main import run\nraise SystemExit(run({words!r}))"


@pytest.fixture(scope="module")
def piped(program):
    return processes.run(program)


@pytest.mark.parametrize(("env", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_come_on_a_terminal_only_and_not_where_no_color_is_set(env, coloured, program, piped):
    seen = on_a_terminal(program, **env)
    colours = {code for code in COLOUR.findall(seen) if re.search(r"[39][1-7]", code)}
    assert bool(colours) == coloured
    assert ("«over the lazy dog" in seen) != coloured
    assert piped.returncode == 0, piped.stderr
    assert "\x1b" not in piped.stdout + piped.stderr
    assert "«over the lazy dog" in piped.stdout


PROGRESS = """
import sys
from draftsmith.recipes.cli import progress as module
from draftsmith.recipes.cli.main import _fail
module.EVERY_S = 0.0 if len(sys.argv) > 1 else 1e9
for done in range(3):
    module.progress(f"{done}/3")
_fail("draftsmith x: interrupted", 0)
module.progress("3/3", last=True)
"""


def test_progress_is_drawn_over_on_a_terminal_and_an_error_stands_on_its_own_line():
    seen = on_a_terminal(PROGRESS)
    assert seen.startswith("\r0/3\x1b[K\r1/3\x1b[K\r2/3\x1b[K\r\ndraftsmith x: interrupted\r\n")
    assert seen.endswith("\r3/3\x1b[K\r\n")


@pytest.mark.parametrize(("words", "lines"), [([], ["3/3"]), (["often"], ["0/3", "1/3", "2/3", "3/3"])])
def test_progress_in_a_file_is_a_line_now_and_then_without_control_characters(words, lines):
    done = processes.run(PROGRESS, *words)
    assert "\x1b" not in done.stderr
    assert "\r" not in done.stderr
    assert [line for line in done.stderr.splitlines() if "/" in line] == lines
