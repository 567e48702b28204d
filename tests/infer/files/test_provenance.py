"""run.json says where a number comes from, and nothing about who ran it."""

import json
import os
import platform
import re
import socket
import subprocess
from datetime import datetime
from pathlib import Path

import pytest

from draftsmith.infer.files import provenance as module
from draftsmith.infer.files.provenance import extras, provenance, revision, without_secrets


def test_it_holds_what_a_reader_needs_to_repeat_the_run():
    facts = provenance(["/somewhere/bin/draftsmith", "bench", "--seed=3"], {"seed": 3, "exits": (1, 2)}, seed=3)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["command"] == ["draftsmith", "bench", "--seed=3"]
    assert facts["config"] == {"seed": 3, "exits": [1, 2]}
    assert facts["seed"] == 3
    assert facts["versions"]["python"] == platform.python_version()
    assert {"draftsmith", "torch", "transformers"} <= set(facts["versions"])
    assert facts["hardware"]["cpu"]["cores"] == os.cpu_count()
    assert facts["hardware"]["memory_gib"] > 0
    assert datetime.fromisoformat(facts["date"]).utcoffset().total_seconds() == 0


def test_no_host_no_user_and_no_environment_secret_is_told(monkeypatch):
    for name in ("USER", "LOGNAME", "HOSTNAME"):
        monkeypatch.setenv(name, "somebody")
    monkeypatch.setattr(platform, "node", lambda: "host-of-somebody")
    monkeypatch.setattr(socket, "gethostname", lambda: "host-of-somebody")
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "correct-horse-battery")
    monkeypatch.setenv("UNTOLD", "an-environment-value")
    command = ["draftsmith", "answers", "--server=http://correct-horse-battery@host/v1", "--out", "/home/somebody/runs"]
    told = json.dumps(provenance(command, {"data": [Path("/home/somebody/a.jsonl")]}, seed=None))
    assert "correct-horse-battery" not in told
    assert "an-environment-value" not in told
    assert "somebody" not in told
    assert '"~/runs"' in told
    assert '"~/a.jsonl"' in told


@pytest.mark.parametrize("name", ["hub_token", "api_key", "token", "password", "hf_token", "client_secret"])
def test_a_value_whose_name_says_secret_is_hidden_wherever_it_stands(name):
    facts = provenance(
        ["draftsmith", "x", f"--{name}", "plain", f"--a.{name}=plain"], {"a": {name: "plain"}}, seed=None
    )
    assert facts["command"] == ["draftsmith", "x", f"--{name}", "***", f"--a.{name}=***"]
    assert facts["config"] == {"a": {name: "***"}}


def test_words_that_only_sound_like_secrets_stay():
    config = {"max_new_tokens": 128, "eos_token": "</s>", "tokenizer": "t", "stop": ["monkey"], "pad_token": None}
    assert without_secrets(config) == config


@pytest.mark.parametrize("text", ["hf_abcdefghijklmnopqrstuv", "sk-abcdefghijklmnopqrst", "ghp_abcdefghijklmnopqrst"])
def test_a_value_that_looks_like_an_access_token_is_hidden(text):
    assert without_secrets(f"before {text} after") == "before *** after"


def test_only_the_home_folder_itself_is_shortened(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert without_secrets("/home/anna/x") == "/home/anna/x"
    assert without_secrets("/data/home/ann/x") == "/data/home/ann/x"
    assert without_secrets("small:/home/ann/x") == "small:~/x"


def git(folder, *arguments):
    names = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run(["git", "-C", folder, *names, *arguments], check=True, capture_output=True)


def test_the_revision_is_told_only_for_a_checkout_of_this_source(tmp_path):
    source = tmp_path / "measure"
    source.mkdir()
    (source / "provenance.py").write_text("one\n")
    assert revision(source) is None
    git(tmp_path, "init")
    assert revision(source) is None, "an untracked copy inside another checkout has no revision"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    clean = revision(source)
    assert re.fullmatch(r"[0-9a-f]{40}", clean["sha"])
    assert clean["dirty"] is False
    (source / "provenance.py").write_text("two\n")
    assert revision(source) == {"sha": clean["sha"], "dirty": True}


def test_a_machine_without_git_has_no_revision(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert revision() is None


def test_extras_tell_what_is_there_and_what_is_absent(monkeypatch):
    requirements = ["torch>=2.6", 'pytest>=8; extra == "dev"', 'no-such-package<9,>=1; extra == "deepspeed"']
    monkeypatch.setattr(module.metadata, "requires", lambda name: requirements)
    assert extras() == {"dev": {"pytest": pytest.__version__}, "deepspeed": {"no-such-package": None}}
