"""The quickstart: which steps run, and the smallest scale killed on its way, resumed, and read."""

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
from draftsmith.recipes.quickstart.run import REFERENCE_SECONDS, run_steps
from draftsmith.recipes.quickstart.steps import SCALES, QuickstartPlan, Step

# The smallest scale with half of its training: what is tested here does not depend on how good the target is.
PROGRAM = """
from dataclasses import replace
from draftsmith.recipes.cli.main import main
from draftsmith.recipes.quickstart.steps import SCALES
SCALES["smoke"] = replace(SCALES["smoke"], target_steps=16, draft_steps=4)
main()
"""
COMMAND = [sys.executable, "-c", PROGRAM, "quickstart", "--scale", "smoke", "--out"]
ASSISTANTS = {"transformers assistant", "transformers assistant#2", "transformers assistant#3"}
PEERS = {"transformers generate", "transformers prompt_lookup", *ASSISTANTS}
OURS = {"plain", "pld", "recycle", "mix", "mix-distil", "sft", "soft", "distil", "rest-ood", "dresd-ood", "rest-id",
        "dresd-id", "empty"}  # fmt: skip


class Bench:
    """Steps a <- b, and c by itself; each writes its name's file, and notes that it did."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: list[str] = []
        self.words = {"a": "1", "b": "1", "c": "1"}
        self.resumes = True
        self.killed = ""

    def steps(self) -> list[Step]:
        return [self.step("a", ()), self.step("b", ("a",)), self.step("c", ())]

    def step(self, name: str, needs: tuple[str, ...]) -> Step:
        out = self.folder / name
        return Step(name, name, out, out / "last", [self.words[name], str(out)], needs, self.resumes, self.make(name))

    def make(self, name: str):
        def make() -> str:
            out = self.folder / name
            out.mkdir(exist_ok=True)
            (out / "run.json").touch()
            (out / "first").write_text((out / "first").read_text() + "+" if (out / "first").exists() else "")
            if name == self.killed:
                raise MemoryError
            (out / "last").touch()
            self.done.append(name)
            return name

        return make

    def run(self) -> list[str]:
        self.done = []
        run_steps(self.steps(), self.folder, {"a": 1.0})
        return self.done


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Bench:
    monkeypatch.setattr("draftsmith.recipes.quickstart.run.machine_seconds", lambda: REFERENCE_SECONDS)
    (tmp_path / "out").mkdir()
    return Bench(tmp_path / "out")


def test_what_is_there_is_not_made_again(bench, capsys):
    assert bench.run() == ["a", "b", "c"]
    assert bench.run() == []
    assert capsys.readouterr().out.count("there already") == 3


@pytest.mark.parametrize(("resumes", "left"), [(True, "+"), (False, "")])
def test_a_killed_step_goes_on_or_begins_anew(bench, resumes, left):
    bench.resumes, bench.killed = resumes, "b"
    with pytest.raises(MemoryError):
        bench.run()
    bench.killed = ""
    assert bench.run() == ["b", "c"]
    assert (bench.folder / "b" / "first").read_text() == left


def test_a_run_folder_that_holds_no_run_yet_is_begun_anew(bench):
    bench.killed = "b"
    with pytest.raises(MemoryError):
        bench.run()
    (bench.folder / "b" / "run.json").unlink()
    bench.killed = ""
    assert bench.run() == ["b", "c"]
    assert (bench.folder / "b" / "first").read_text() == ""


def test_a_kill_after_the_last_file_loses_nothing(bench):
    bench.run()
    record = bench.folder / "steps" / "b.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "state": "begun"}))
    assert bench.run() == []


def test_other_settings_are_made_anew_with_all_that_reads_them(bench, capsys):
    bench.run()
    bench.words["a"] = "2"
    assert bench.run() == ["a", "b"]
    assert capsys.readouterr().out.count("made with other settings or inputs") == 2
    assert (bench.folder / "b" / "first").read_text() == ""
    assert bench.run() == []


def test_other_settings_after_a_kill_do_not_go_on_from_what_it_left(bench):
    bench.killed = "a"
    with pytest.raises(MemoryError):
        bench.run()
    bench.killed, bench.words["a"] = "", "2"
    assert bench.run() == ["a", "b", "c"]
    assert (bench.folder / "a" / "first").read_text() == ""


def test_an_output_that_was_taken_away_is_made_again(bench):
    bench.run()
    (bench.folder / "c" / "last").unlink()
    assert bench.run() == ["c"]
    assert (bench.folder / "c" / "first").read_text() == ""


def test_what_reads_an_output_that_was_made_again_is_made_again_even_after_a_kill(bench):
    bench.run()
    (bench.folder / "a" / "last").unlink()
    bench.killed = "b"
    with pytest.raises(MemoryError):
        bench.run()
    bench.killed = ""
    assert bench.run() == ["b"]
    (bench.folder / "a" / "last").unlink()
    bench.killed = "a"
    with pytest.raises(MemoryError):
        bench.run()
    bench.killed = ""
    assert bench.run() == ["a", "b"]


def test_the_folder_may_be_moved(bench):
    bench.run()
    bench.folder = bench.folder.rename(bench.folder.with_name("elsewhere"))
    assert bench.run() == []


def test_a_proof_of_other_settings_proves_nothing(bench):
    """A page whose Markdown is written last: the older Markdown must go when the page is begun with other words."""
    page, proof = bench.folder / "page.html", bench.folder / "page.md"

    def step(words: str, fails: bool) -> Step:
        def make() -> str:
            page.touch()
            if fails:
                raise MemoryError
            proof.touch()
            return ""

        return Step("page", "page", page, proof, [words], make=make)

    run_steps([step("1", False)], bench.folder, {})
    with pytest.raises(MemoryError):
        run_steps([step("2", True)], bench.folder, {})
    assert run_steps([step("2", False)], bench.folder, {}) == 1


def test_what_is_not_the_quickstarts_is_not_touched(bench):
    (bench.folder / "b").mkdir()
    (bench.folder / "b" / "mine").touch()
    with pytest.raises(ValueError, match="is not the quickstart's"):
        bench.run()
    assert (bench.folder / "b" / "mine").exists()


def test_an_interrupted_command_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr("draftsmith.recipes.cli.main.run", lambda words: 130)
    step = Step("a", "a", tmp_path / "a", None, ["bench"])
    with pytest.raises(KeyboardInterrupt, match="run the same command again"):
        run_steps([step], tmp_path, {})


def test_a_failed_command_is_named(tmp_path, capsys):
    step = Step("a", "a", tmp_path / "a", tmp_path / "a" / "last", ["store", "info", str(tmp_path / "none")])
    with pytest.raises(ValueError, match="step 1 of 1 failed"):
        run_steps([step], tmp_path, {})
    assert f"draftsmith store info {tmp_path / 'none'}" in capsys.readouterr().out


# The whole command, at its smallest scale.


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


@pytest.mark.slow  # `make quickstart SCALE=smoke` is a step of its own in .ci/run
def test_it_goes_on_where_it_was_killed(ran):
    _, _, done = ran
    assert done.returncode == 0, done.stderr
    assert "resuming from step-" in done.stderr
    assert done.stdout.count("\n      there already: ") == 1
    assert done.stdout.count("resuming") == 1


@pytest.mark.slow  # `make quickstart SCALE=smoke` is a step of its own in .ci/run
def test_every_drafter_gives_the_greedy_answers_of_plain_decoding(ran):
    found = results(ran[0], "bench-greedy")
    assert set(found) == {*OURS, *PEERS, "oracle", "adversary"}
    for name, row in found.items():
        assert row["errors"] == 0, name
        assert row["equal"] + row["ties"] == row["total"] == SCALES["smoke"].questions, name
    assert found["oracle"]["accepted_length"] > 3
    assert found["adversary"]["acceptance_rate"] == 0
    assert found["soft"]["accepted_length"] > 1


@pytest.mark.slow  # `make quickstart SCALE=smoke` is a step of its own in .ci/run
def test_the_same_drafters_are_measured_at_a_temperature(ran):
    found = results(ran[0], "bench-drawn")
    assert set(found) == {*OURS, *PEERS}
    assert all(row["errors"] == 0 for row in found.values())


@pytest.mark.slow  # `make quickstart SCALE=smoke` is a step of its own in .ci/run
def test_its_last_lines_are_the_verdicts_the_page_and_whole_commands(ran):
    folder, _, done = ran
    ending = done.stdout[done.stdout.rindex("steps in") :]
    assert "At temperature 0 " in ending
    assert "At temperature 0.8 " in ending
    assert f"report: {folder / 'report.html'}" in ending
    assert (folder / "report.html").stat().st_size > 10_000
    assert f"draftsmith plan --target {folder / 'target'}" in ending
    assert f"draftsmith replay --data {folder / 'answers.jsonl'} --tokenizer {folder / 'target'}" in ending


@pytest.mark.slow  # `make quickstart SCALE=smoke` is a step of its own in .ci/run
def test_a_run_folder_names_the_command_that_repeats_the_step(ran):
    run = json.loads((ran[0] / "bench-greedy" / "run.json").read_text())
    assert run["command"][1:3] == ["bench", "--target"]


@pytest.mark.slow  # `make quickstart SCALE=smoke` is a step of its own in .ci/run
def test_the_calibration_was_used(ran):
    folder = ran[0]
    assert list((folder / "draft-soft" / "calibration").iterdir())
    assert list((folder / "store-rest-id" / "calibration").iterdir())


@pytest.mark.slow  # `make quickstart SCALE=smoke` is a step of its own in .ci/run
def test_a_second_run_finds_everything_there(ran):
    folder, cache, _ = ran
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    began = time.perf_counter()
    again = quickstart(folder, cache)
    took = time.perf_counter() - began
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("\n      there already: ") == 14
    assert "everything is there already" in again.stdout
    assert made == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert took < 15


@pytest.mark.slow  # `make quickstart SCALE=smoke` is a step of its own in .ci/run
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
