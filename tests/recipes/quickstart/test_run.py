"""Which steps are run: none twice, none that a kill left unfinished passed over, none of other settings taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from draftsmith.recipes.quickstart.run import run_steps
from draftsmith.recipes.quickstart.steps import Step


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
def bench(tmp_path) -> Bench:
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
    assert capsys.readouterr().out.count("made with other settings, or of other inputs") == 2
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
