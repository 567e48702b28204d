"""The quickstart at its smallest scale, killed on its way and taken up again; what it leaves, and what it prints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from draftsmith.recipes.cli.main import COMMANDS, load
from draftsmith.recipes.quickstart.scales import SCALES
from draftsmith.recipes.quickstart.steps import QuickstartPlan

COMMAND = [sys.executable, "-m", "draftsmith.recipes", "quickstart", "--scale", "smoke", "--out"]
PEERS = {"transformers generate", "transformers prompt_lookup", "transformers assistant"}
OURS = {"plain", "pld", "sft", "soft", "distil", "rest-ood", "dresd-ood", "rest-id", "dresd-id", "empty"}


def quickstart(folder: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DRAFTSMITH_CACHE": str(cache)}
    return subprocess.run([*COMMAND, str(folder)], capture_output=True, text=True, timeout=600, env=environment)


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[Path, Path, subprocess.CompletedProcess[str]]:
    """(folder, cache, how it ended): killed in the middle of the target's training, then run to its end."""
    folder, cache = tmp_path_factory.mktemp("quick") / "smoke", tmp_path_factory.mktemp("cache")
    begun = subprocess.Popen(
        [*COMMAND, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"DRAFTSMITH_CACHE": str(cache)},
    )  # fmt: skip
    while not list((folder / "target").glob("resume/step-*.ckpt")):
        assert begun.poll() is None, "it ended before it was killed"
        time.sleep(0.05)
    os.kill(begun.pid, signal.SIGKILL)
    begun.wait()
    assert not (folder / "target" / "config.json").exists(), "the kill came too late"
    return folder, cache, quickstart(folder, cache)


def results(folder: Path, run: str) -> dict[str, dict]:
    return json.loads((folder / run / "results.json").read_text())["drafters"]


def test_it_goes_on_where_it_was_killed(ran):
    _, _, done = ran
    assert done.returncode == 0, done.stderr
    assert "resuming from step-" in done.stderr
    assert done.stdout.count("\n      there already: ") == 1
    assert done.stdout.count("it goes on where it was") == 1


def test_every_drafter_gives_the_greedy_answers_of_plain_decoding(ran):
    found = results(ran[0], "bench-greedy")
    assert set(found) == {*OURS, *PEERS, "oracle", "adversary"}
    for name, row in found.items():
        assert row["errors"] == 0, name
        assert row["equal"] + row["ties"] == row["total"] == SCALES["smoke"].questions, name
    assert found["oracle"]["accepted_length"] > 3
    assert found["adversary"]["acceptance_rate"] == 0
    assert found["soft"]["accepted_length"] > 1


def test_the_same_drafters_are_measured_at_a_temperature(ran):
    found = results(ran[0], "bench-drawn")
    assert set(found) == OURS
    assert all(row["errors"] == 0 for row in found.values())


def test_its_last_lines_are_the_verdicts_the_page_and_whole_commands(ran):
    folder, _, done = ran
    ending = done.stdout[done.stdout.rindex("steps in") :]
    assert "At temperature 0 " in ending
    assert "At temperature 0.8 " in ending
    assert f"report: {folder / 'report.html'}" in ending
    assert (folder / "report.html").stat().st_size > 10_000
    assert f"draftsmith plan --target {folder / 'target'}" in ending
    assert f"draftsmith replay --data {folder / 'answers.jsonl'} --tokenizer {folder / 'target'}" in ending


def test_a_run_folder_names_the_command_that_repeats_the_step(ran):
    run = json.loads((ran[0] / "bench-greedy" / "run.json").read_text())
    assert run["command"][1:3] == ["bench", "--target"]


def test_the_calibration_was_used(ran):
    folder = ran[0]
    assert list((folder / "draft-soft" / "calibration").iterdir())
    assert list((folder / "store-rest-id" / "calibration").iterdir())


def test_a_second_run_finds_everything_there(ran):
    folder, cache, _ = ran
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    began = time.perf_counter()
    again = quickstart(folder, cache)
    took = time.perf_counter() - began
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("\n      there already: ") == 14
    assert "everything is there" in again.stdout
    assert made == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert took < 15


def test_the_replay_that_it_ends_with_runs(ran, call):
    folder = ran[0]
    line = next(line for line in ran[2].stdout.splitlines() if line.startswith("  draftsmith replay"))
    told = call(*line.split()[1:], "--limit", 4, "--json")
    assert {"pld", "rest"} <= set(told.json["drafters"])
    assert str(folder) in line


@pytest.mark.parametrize("scale", SCALES)
def test_every_step_is_a_command_with_options_that_exist(tmp_path, scale):
    from draftsmith.recipes.cli.argv import normalise, options

    for step in QuickstartPlan(tmp_path, SCALES[scale], 0).steps():
        if step.make is not None:
            continue
        name = max((name for name in COMMANDS if " ".join(step.words).startswith(f"{name} ")), key=len)
        words = list(step.words[len(name.split()) :])
        assert normalise(words, options(load(COMMANDS[name])))
