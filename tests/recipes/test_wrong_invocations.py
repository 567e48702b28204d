"""Whatever is wrong with a command line: exit code 0, 1 or 2, a line or two, no traceback, nothing half written.

The command lines are drawn from every command's own table of options and from values that users get wrong.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from draftsmith.recipes.cli.argv import Option, options
from draftsmith.recipes.cli.main import COMMANDS, load, run

NUMBERS = ["0", "1", "2", "-1", "-5", "0.5", "2.5", "1e400", "nan", "inf", "-inf", str(10**30), "x", "", "null",
           "[1, 2]", "[0]", "[]", "true", "½", "--json"]  # fmt: skip
TEXTS = [
    "",
    " ",
    "x",
    "null",
    "[]",
    "[x",
    "{}",
    "{a: 1}",
    "a,b",
    "ünï/码 码",
    "-",
    "~nobody/x",
    "a" * 300,
    "0",
    "!!python/none",
]
SPECS = [
    "pld", "", "nosuch", "pld[", "pld]", "pld[x=1]", "pld[num_draft_tokens=0]", "pld[num_draft_tokens=x]", "pld:3",
    "pld,,pld", "a=pld,a=pld", "plain=pld", "=", "small", "small:{missing}", "small:{damaged}", "sd2:{file}", "sd2:[",
    "small:{damaged}[top_k=0]", "rest:{empty}", "rest:{file}", "dresd:{missing}", "empty,oracle", "{yaml}",
    "{missing}.yaml",
]  # fmt: skip
PLACES = ["{missing}", "{file}", "{empty}", "{full}", "{damaged}", "{image}", "", "no/such/place", "ünï/码"]
# By the option's name, where other values than those of its type go deeper.
POOLS: dict[str, list[str]] = {
    "drafters": SPECS,
    "peers": ["generate", "nobody", "assistant", "assistant:{missing}", "generate:x", "[", ""],
    "target": ["{damaged}", *PLACES],
    "checkpoint": ["{damaged}", *PLACES],
    "tokenizer": ["{damaged}", *PLACES],
    "data": ["{rows}", "{rows}", "{torn}", "{image}", *PLACES],
    "out": ["new", "new/deep", "{file}/x", *PLACES],
    "store_out": ["new", *PLACES],
    "plot": ["new.svg", "new.png", *PLACES],
    "config": ["{yaml}", "{torn}", "{options}", *PLACES],
    "device": ["cpu", "cuda", "gpu", "cuda:3", "mps", "nonsense", "", "cpu:x", "meta"],
    "dtype": ["auto", "float32", "float8", ""],
    "template": ["chat", "plain", "vicuna_v1.1", "vicuna", "{prompt}", "{prompt} {prompt}", "", "{"],
    "server": ["nonsense", "", "ftp://x"],
    "hub": ["", "x", "a/b/c"],
    "split": ["rows:0.5", "rows:2", "time:x", "x", "rows:"],
    "trees": ["4x2", "0x0", "4x", "x", ""],
    "shapes": ["1x32", "0x0", "1x33", "x", ""],
    "acceptance": ["0.7", "2", "x", "{missing}", "{rows}", "{rows}:pld"],
    "names": ["train_soft", "nosuch", ""],
}
# What would begin long work or reach for a server is stopped by one option that is always wrong.
STOPPED: dict[str, list[list[str]]] = {
    "quickstart": [["--scale", "huge"], ["--out", "{file}"], ["--seed", "-1"]],
    "plan": [["--target", "{missing}"], ["--target", "{file}"], ["--lengths", "0"], ["--seconds", "nan"]],
    "train target": [["--data", "{missing}"], ["--data", "{empty}"], ["--num_layers", "0"]],
}
UNKNOWN = ["--nosuch", "--nosuch=1", "--batchsize", "-x", "--", "---", "--=", "stray", "{file}", "-1", "--help=3"]


def make_places(root: Path, target: str) -> dict[str, str]:
    """Files and folders that the command lines name, `{name}` -> path; the weights of `damaged` cannot be read."""
    shutil.copytree(target, root / "damaged")
    weights = root / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    (root / "empty").mkdir()
    (root / "full").mkdir()
    (root / "full" / "mine").write_text("kept")
    row = json.dumps({"id": "1", "prompt": "hello", "output": "hello there", "time": "2026-01-01"})
    (root / "rows.jsonl").write_text(f"{row}\n{row}\n")
    (root / "torn.jsonl").write_text(row + '\n{"prompt": "c"\n')
    (root / "image.jsonl").write_bytes(bytes(range(256)) * 4)
    (root / "file").write_text("text")
    (root / "drafters.yaml").write_text("mine: {class_path: builtins.dict, more: 1}\n")
    (root / "options.yaml").write_text("data: 3\nnosuch: [1]\nseed: {a: 1}\n")
    names = {"rows": "rows.jsonl", "torn": "torn.jsonl", "image": "image.jsonl", "yaml": "drafters.yaml",
             "options": "options.yaml"}  # fmt: skip
    names |= {name: name for name in ("damaged", "empty", "full", "file", "missing")}
    return {f"{{{name}}}": str(root / path) for name, path in names.items()}


def _is_number(hint: Any) -> bool:
    members = get_args(hint) or (hint,)
    return any(isinstance(one, type) and issubclass(one, (int, float)) and one is not bool for one in members) or any(
        _is_number(one) for one in members if get_args(one)
    )


def _values(option: Option) -> list[str]:
    found = POOLS.get(option.name.rpartition(".")[2])
    return found or (NUMBERS if _is_number(option.hint) else TEXTS)


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """The words of a command line; names in braces are filled in by the caller."""
    name = draw(st.sampled_from(list(COMMANDS)))
    known = options(load(COMMANDS[name]))
    needed = [
        option for option in known.values() if option.positional or option.name in ("target", "data", "out", "drafters")
    ]
    chosen = [option for option in needed if draw(st.integers(0, 9)) > 0]
    chosen += draw(st.lists(st.sampled_from(list(known.values())), max_size=4))
    words: list[str] = []
    for option in chosen:
        value = draw(st.sampled_from(_values(option)))
        flag = f"--{option.name}"
        shapes = [[flag, value]] * 6 + [[f"{flag}={value}"]] * 2 + [[flag]]
        words += [value] if option.positional and draw(st.booleans()) else draw(st.sampled_from(shapes))
    if draw(st.integers(0, 5)) == 0:
        words += ["--config", draw(st.sampled_from(POOLS["config"]))]
    if draw(st.integers(0, 5)) == 0:
        words.insert(draw(st.integers(0, len(words))), draw(st.sampled_from(UNKNOWN)))
    if name in STOPPED:
        words += draw(st.sampled_from(STOPPED[name]))
    return [*name.split(), *words]


def _files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.lstat().st_size for path in folder.rglob("*")}


def make_attempt(target: str, root: Path, here: Path) -> Callable[[list[str]], int]:
    """What runs words in the empty folder `here`, checks what they leave, and returns the exit code."""
    places = make_places(root, target)
    before = _files(root)

    def attempt(words: list[str]) -> int:
        for name, path in places.items():
            words = [word.replace(name, path) for word in words]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.chdir(here), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(words)
        left = _files(here)
        for path in here.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        printed = err.getvalue()
        assert code in (0, 1, 2), printed
        assert "Traceback" not in printed + out.getvalue()
        if code:
            assert 1 <= len(printed.splitlines()) <= 3, printed
            assert not left, left
            assert _files(root) == before
        for name in _files(root).keys() - before.keys():  # what a command that ended well has written
            made = root / name
            shutil.rmtree(made, ignore_errors=True) if made.is_dir() else made.unlink(missing_ok=True)
        return code

    return attempt


@pytest.fixture(scope="module")
def attempt(folders, tmp_path_factory) -> Callable[[list[str]], int]:
    return make_attempt(folders.target, tmp_path_factory.mktemp("inputs"), tmp_path_factory.mktemp("here"))


@pytest.fixture(autouse=True)
def _calm(monkeypatch, tmp_path):
    monkeypatch.delenv("DRAFTSMITH_TRACEBACK", raising=False)
    monkeypatch.delenv("SCALE", raising=False)
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))


_QUIET = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=150, **_QUIET)
@given(words=command_lines())
def test_a_wrong_invocation_ends_in_a_line_and_leaves_nothing(attempt, words):
    attempt(words)


@pytest.mark.slow
@settings(max_examples=2000, **_QUIET)
@given(words=command_lines())
def test_two_thousand_wrong_invocations(attempt, words):
    attempt(words)
