"""Recipes as scripts: what each would run is parsed by its commands, and those that nothing else runs are run.

A script is run from a copy of it, with a `draftsmith` in front of the path that notes its words and does nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_folders import save, tiny_llama

from draftsmith.recipes.cli.argv import normalise, options
from draftsmith.recipes.cli.main import COMMANDS, _split, build_parser, load
from draftsmith.recipes.commands.recipes import packaged

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SCRIPTS = [recipe.name for recipe in packaged()]
# Read by no command: a study that is no `draftsmith` command.
OTHERWISE = {"sorted_training.yaml"}
# What a script takes a branch by: (first positional, environment).
BRANCHES: dict[str, list[tuple[list[str], dict[str, str]]]] = {
    "build_rest_chat": [(["large"], {})],
    "build_rest_code": [(["large"], {})],
    "build_dresd_id": [([], {"CORPUS": "code", "HELD_OUT": "held_out.jsonl"})],
    "build_dresd_ood": [([], {"CORPUS": "code"})],
    "compare_learned_vs_retrieval": [([], {"TRAINING": "--minutes 3", "SFT_LAYERS": "2"})],
}
NOTE = '#!/usr/bin/env bash\n{ printf "%s\\n" "$@"; printf "\\036\\n"; } >> "$NOTED"\n'


def run_copied(name: str, folder: Path, positionals: list[str], environment: dict[str, str]) -> list[list[str]]:
    """The words of every `draftsmith` that the script runs."""
    copied, work = folder / "copied", folder / "work"
    work.mkdir(parents=True)
    (recipe,) = (one for one in packaged() if one.name == name)
    copied.mkdir()
    for file in recipe.files:
        shutil.copy(RECIPES / file, copied / file)
    command = folder / "bin" / "draftsmith"
    command.parent.mkdir()
    command.write_text(NOTE)
    command.chmod(0o755)
    study = command.with_name("python")  # what is no `draftsmith` command is not run
    study.write_text("#!/bin/sh\n")
    study.chmod(0o755)
    script = (copied / f"{name}.sh").read_text()
    required = re.findall(r"\$\{(\w+):\?", script)
    given = positionals or ["given"] * len([one for one in required if one.isdecimal()])
    env = {"PATH": f"{command.parent}:{os.environ['PATH']}", "NOTED": str(folder / "noted")}
    env |= {one: "1 2" for one in required if not one.isdecimal()} | environment
    words = ["bash", str(copied / f"{name}.sh"), *given]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=env, cwd=work)
    assert done.returncode == 0, done.stderr
    noted = (folder / "noted").read_text().split("\n\x1e\n")[:-1]
    return [one.split("\n") for one in noted]


def accepted(words: list[str]) -> set[str]:
    """Parse a command line by its command, objects and all; the configuration files that it read."""
    name, rest = _split(words, COMMANDS)
    assert name in COMMANDS, words
    function = load(COMMANDS[name])
    known = options(function)
    normal = normalise(rest, known)
    parser = build_parser(name, function, known)
    parser.instantiate(parser.parse_args(normal))
    return {Path(word.removeprefix("--config=")).name for word in normal if word.startswith("--config=")}


@pytest.fixture(scope="module")
def noted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[str]]]:
    """Script -> every command line that it runs on any of its branches."""
    found: dict[str, list[list[str]]] = {}
    for name in SCRIPTS:
        for branch in [([], {}), *BRANCHES.get(name, [])]:
            found.setdefault(name, []).extend(run_copied(name, tmp_path_factory.mktemp(name), *branch))
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_reads_the_script(name: str) -> None:
    subprocess.run(["bash", "-n", RECIPES / f"{name}.sh"], check=True, timeout=60)
    assert os.access(RECIPES / f"{name}.sh", os.X_OK)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_command_of_a_copied_script_is_one_that_its_parser_takes(name: str, noted: Any) -> None:
    assert noted[name]
    for words in noted[name]:
        accepted(words)


def test_every_yaml_is_read_by_a_command_of_a_script(noted: Any) -> None:
    read = {file for commands in noted.values() for words in commands for file in accepted(words)}
    assert {path.name for path in RECIPES.glob("*.yaml")} == read | OTHERWISE


def test_a_yaml_with_a_key_that_its_command_lacks_would_be_found(tmp_path: Path) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text((RECIPES / "bench_sd2.yaml").read_text() + "max_tokens: 3\n")
    with pytest.raises(Exception, match="max_tokens"):
        accepted(["bench", "--config", str(config), "--target", "t", "--data", "d"])
    with pytest.raises(ValueError, match="unknown option --tokens"):
        accepted(["bench", "--target", "t", "--data", "d", "--tokens", "3"])


def test_the_study_of_learning_takes_its_yaml() -> None:
    from jsonargparse import auto_parser

    from draftsmith.recipes.studies.sorted_training import sorted_training

    config = str(RECIPES / "sorted_training.yaml")
    given = ["--config", config, "--target", "t", "--data", "[d]", "--questions", "[q]", "--out", "o"]
    parser = auto_parser(sorted_training)
    parser.instantiate(parser.parse_args(given))


def test_every_short_name_is_a_class_that_takes_its_argument() -> None:
    import importlib
    import inspect

    from draftsmith.infer.drafters.registry import short_names

    for name, entry in short_names().items():
        module, _, attribute = entry["class_path"].rpartition(".")
        taken = inspect.signature(getattr(importlib.import_module(module), attribute)).parameters
        assert {*filter(None, [entry.get("argument")]), *entry.get("init_args", {})} <= set(taken), name


@pytest.mark.parametrize("path", [*RECIPES.glob("*.sh"), *RECIPES.glob("*.yaml")], ids=lambda path: path.name)
def test_a_command_that_a_comment_names_has_the_options_that_it_names(path: Path) -> None:
    text = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.lstrip().startswith("#"))
    for span in re.findall(r"`draftsmith ([^`]+)`", text):
        words = span.split()
        name, rest = _split(words, COMMANDS)
        if name not in COMMANDS:
            assert name, span
            continue
        known = {option.partition(".")[0] for option in options(load(COMMANDS[name]))} | {"config", "help"}
        flags = {word[2:].partition("=")[0].partition(".")[0] for word in rest if word.startswith("--")}
        assert flags <= known, span
    for file in re.findall(r"(?<![\w/$.])(?:recipes/)?([a-z]\w*\.(?:sh|yaml))\b", text):
        assert (RECIPES / file).is_file() or file in ("more.yaml",), f"{path.name} names {file}"


@pytest.fixture
def run_real(script: Any) -> Any:
    """Run a recipe with the real command; it has to succeed."""

    def run(name: str | Path, *words: object, **environment: object) -> subprocess.CompletedProcess[str]:
        done: subprocess.CompletedProcess[str] = script(name, *words, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.mark.parametrize("name", ["build_rest_chat", "build_rest_code"])
def test_a_small_store_is_built_as_the_script_says(name: str, run_real: Any, folders: Any, rows_file: Any) -> None:
    data = rows_file([{"prompt": "what is it?", "output": "the quick brown fox jumps over the lazy dog"}] * 3)
    out = Path(data).parent / "store"
    run_real(name, "small", "--data", data, "--tokenizer", folders.target, "--template", "plain", "--out", out)
    assert json.loads((out / "store.json").read_text())["kind"] == "rest"


@pytest.mark.slow
def test_a_target_is_trained_as_the_script_says(run_real: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of a text that goes on and on, {i * i}\n" for i in range(400)))
    config = yaml.safe_load((RECIPES / "train_target.yaml").read_text()) | {
        "minutes": None, "max_steps": 2, "vocab_size": 300, "hidden_size": 64, "num_layers": 2,
    }  # fmt: skip
    config["machine"]["workers"] = 0
    # The script takes no options; so its configuration is made small, beside it.
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train_target.yaml").write_text(yaml.safe_dump(config))
    shutil.copy(RECIPES / "train_target.sh", folder)
    run_real(folder / "train_target.sh", tmp_path / "target", text)
    assert (tmp_path / "target" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_small_comparison_runs_to_its_report_and_goes_on_where_it_was(
    call: Any, folders: Any, rows_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script's own words, each run in this process: fourteen processes would only import the same again."""
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "cache"))
    target = save(tmp_path / "target", tiny_llama(hidden_size=64, num_hidden_layers=4), folders.tokenizer)
    words = ["fox", "dog", "lazy", "brown", "quick", "jumps", "over", "what", "says", "that"]
    rows = [{"question_id": i, "category": "words", "turns": [f"say {words[i % 10]} {i}"]} for i in range(40)]
    training = "--max_steps 2 --minutes null --text.max_length 128 --optim.batch_size 2 --optim.micro_batch_size 1"
    training += " --machine.workers 0 --watch.val_prompts 0 --watch.val_every 0"
    out = tmp_path / "out"
    given = {
        "TARGET": target, "PROMPTS": rows_file(rows[:24], "prompts.jsonl"), "TRAINING": training, "TOKENS": 24,
        "HELD_OUT": rows_file(rows[24:36], "held.jsonl"), "QUESTIONS": rows_file(rows[37:], "q.jsonl"), "OUT": out,
        "DTYPE": "float32", "COST_SECONDS": 5,
    }  # fmt: skip
    environment = {key: str(value) for key, value in given.items()}
    bench = ["--max_new_tokens", "8", "--warmup", "0"]
    script = "compare_learned_vs_retrieval_small"
    planned = run_copied(script, tmp_path / "first", bench, environment)
    names = [_split(one, COMMANDS)[0] for one in planned]
    assert names == ["answers", "train sft", "export", "train soft", "export", "store build rest", "store build dresd",
                     *["calibrate", "bench", "bench"] * 2, "report"]  # fmt: skip
    for one in planned:
        told = call(*one)
        assert told.code == 0, (one, told.err)
    assert (out / "report.html").is_file()
    for temperature in ("0", "0.8"):
        for batch_size in (1, 8):
            results = json.loads((out / f"bench-T{temperature}-B{batch_size}" / "results.json").read_text())
            assert set(results["drafters"]) == {"plain", "pld", "rest", "dresd", "small", "sd2", "oracle"}
            assert results["batch_size"] == batch_size
    (out / "bench-T0-B8" / "results.json").unlink()
    again = run_copied(script, tmp_path / "again", bench, environment)
    # What stands is passed over, and what was left half-way is made anew.
    assert [_split(one, COMMANDS)[0] for one in again] == ["answers", "bench", "report"]
    assert again[1][again[1].index("--out") + 1] == str(out / "bench-T0-B8")
    for one in again:
        told = call(*one)
        assert told.code == 0, (one, told.err)
