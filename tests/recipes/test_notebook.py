"""The notebook: every command in it is one, nothing of a run is left in it, and run, it ends in a verdict."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import nbformat
import pytest

from draftsmith.recipes.cli.argv import normalise, options
from draftsmith.recipes.cli.main import COMMANDS, build_parser, load

FILE = Path(__file__).resolve().parents[2] / "recipes" / "from_logs_to_a_verdict.ipynb"
WAY = ["data", "train target", "replay", "train sft", "answers", "forecast", "bench", "report"]


@pytest.fixture
def notebook() -> Any:
    return nbformat.read(FILE, as_version=4)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_valid_and_holds_no_output(notebook):
    nbformat.validate(notebook)
    assert len(notebook.cells) > 10
    for cell in code(notebook):
        assert (cell.outputs, cell.execution_count) == ([], None)
        assert max(map(len, cell.source.splitlines())) <= 120
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


def name_of(words: list[str]) -> str:
    """The command that the words begin with, if its parser takes the others."""
    name = next(" ".join(words[:count]) for count in (2, 1) if " ".join(words[:count]) in COMMANDS)
    function = load(COMMANDS[name])
    known = options(function)
    build_parser(name, function, known).parse_args(normalise(words[len(name.split()) :], known))
    return name


# What a command would have left for the cells behind it.
FIGURES = {"accepted_length": 2.0, "hit_rate": 0.5, "equal": 1, "total": 1}
FORECAST = {"length": 2, "accepted_length": 2.0, "accepted_length_interval": [1.5, 2.5]}
LEFT: dict[str, Any] = {
    "replay": {"drafters": {"rest": FIGURES}},
    "forecast": {"drafters": {"small": {"token": [FORECAST]}}},
    "report": {"verdicts": ["Use rest."], "notes": [], "page": "report.html"},
}


def test_its_commands_are_commands_in_the_order_of_the_way(notebook, tmp_path, monkeypatch, capsys):
    from draftsmith.recipes.cli import main

    monkeypatch.chdir(tmp_path)
    seen: list[str] = []

    def instead(words: list[str]) -> int:
        name = name_of(words)
        seen.append(name)
        if name == "data":
            return main_run(words)
        if name == "bench":
            out = Path(words[words.index("--out") + 1])
            out.mkdir()
            (out / "results.json").write_text(json.dumps({"drafters": {"rest": FIGURES}}))
        print(json.dumps(LEFT.get(name, {})))
        return 0

    main_run = main.run
    monkeypatch.setattr(main, "run", instead)
    space: dict[str, Any] = {}
    for cell in code(notebook):
        exec(cell.source, space)
    assert seen == WAY
    printed = capsys.readouterr().out
    assert "60 rows read, 60 used, 0 skipped" in printed
    assert "Use rest." in printed
    earlier, later = (
        (tmp_path / "from_logs" / f"{name}.jsonl").read_text().splitlines() for name in ("earlier", "later")
    )
    assert (len(earlier), len(later)) == (45, 15)
    assert not {*earlier} & {*later}
    assert max(json.loads(row)["time"] for row in earlier) < min(json.loads(row)["time"] for row in later)


def test_a_command_that_is_wrong_would_be_found():
    with pytest.raises(ValueError, match="unknown option --drafter"):
        name_of(shlex.split("bench --target T --data F --drafter pld"))


@pytest.mark.slow
def test_run_from_the_first_cell_to_the_last_it_says_which_drafter_to_use(notebook, tmp_path):
    from nbclient import NotebookClient

    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    said = "".join(one.text for one in code(notebook)[-1].outputs if one.output_type == "stream")
    found = re.search(r"^Use rest: (\S+)x \[(\S+), (\S+)\] plain decoding at batch 1\.", said, re.MULTILINE)
    assert found, said
    figures = json.loads((tmp_path / "from_logs" / "run" / "results.json").read_text())["drafters"]
    rest = figures["rest"]
    assert [f"{value:.2f}" for value in (rest["speedup"], *rest["speedup_interval"])] == list(found.groups())
    assert {name: (one["equal"], one["total"]) for name, one in figures.items()} == dict.fromkeys(
        ("plain", "pld", "rest", "small"), (15, 15)
    )
    assert rest["accepted_length"] > 2 > figures["pld"]["accepted_length"] > 1
    assert figures["small"]["accepted_length"] > 1.5
    assert said.count("15 of 15 answers are plain's") == 4
    assert (tmp_path / "from_logs" / "run" / "report.html").is_file()
