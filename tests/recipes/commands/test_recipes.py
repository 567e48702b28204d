"""Packaged recipes: listed from their own headers, copied whole, and never over something that is there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from draftsmith.recipes.commands.recipes import packaged

ROOT = Path(__file__).resolve().parents[3]
RECIPES = ROOT / "recipes"
SCRIPTS = sorted(path.stem for path in RECIPES.glob("*.sh"))


def test_every_script_is_listed_with_what_its_header_says(call):
    listed = {one["name"]: one for one in call("recipes", "--json").json["recipes"]}
    assert sorted(listed) == SCRIPTS
    for name, one in listed.items():
        assert set(one["size"].split(" or ")) <= {"small", "full"}, name
        assert re.fullmatch(r"not yet|((in part|small), )?\d{4}-\d\d-\d\d", one["measured"]), name
        assert ("small" in one["size"]) or not name.endswith("_small")
        assert len(one["purpose"]) > 20
    told = call("recipes")
    assert told.code == 0
    assert all(f"{name}  (" in told.out for name in SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_header_that_says_measured_has_a_figure_and_one_that_says_not_yet_has_none(name):
    header = "".join(line for line in (RECIPES / f"{name}.sh").read_text().splitlines(True) if line.startswith("#"))
    (recipe,) = (one for one in packaged() if one.name == name)
    facts = header[header.index("Measured: ") + 1 :]
    dated = re.search(r"\d{4}-\d\d-\d\d|(January|November) \d{4}", facts.partition("\n")[2])
    assert bool(dated) == (recipe.measured != "not yet")


def test_a_copy_brings_the_files_that_the_script_reads_and_is_executable(call, tmp_path):
    out = tmp_path / "mine"
    told = call("recipes", "copy", "train_distil", "plan.sh", "--out", out, "--json")
    files = {"train_distil.sh", "train_distil.yaml", "answers.sh", "answers.yaml", "plan.sh"}
    assert set(told.json["files"]) == {path.name for path in out.iterdir()} == files
    for path in out.iterdir():
        assert path.read_bytes() == (RECIPES / path.name).read_bytes()
        assert os.access(path, os.X_OK) == (path.suffix == ".sh")


def test_every_recipe_finds_all_that_it_reads_in_its_copy(call, tmp_path):
    for name in SCRIPTS:
        assert call("recipes", "copy", name, "--out", tmp_path / name).code == 0
        code = re.sub(r"^\s*#.*$", "", (tmp_path / name / f"{name}.sh").read_text(), flags=re.MULTILINE)
        read = set(re.findall(r"\$(?:here|recipes)/(\w+\.\w+)", code))
        assert read <= {path.name for path in (tmp_path / name).iterdir()}, name


def test_nothing_is_written_over(call, tmp_path):
    mine = tmp_path / "train_soft.yaml"
    mine.write_text("num_layers: 3\n")
    told = call("recipes", "copy", "train_soft", "--out", tmp_path)
    assert (told.code, told.out) == (2, "")
    assert "train_soft.yaml already exists" in told.err
    assert [path.name for path in tmp_path.iterdir()] == ["train_soft.yaml"]
    assert mine.read_text() == "num_layers: 3\n"


def test_a_recipe_that_was_copied_before_is_refused_and_one_that_shares_a_file_is_not(call, tmp_path):
    assert call("recipes", "copy", "answers", "--out", tmp_path).code == 0
    assert call("recipes", "copy", "answers", "--out", tmp_path).code == 2
    assert call("recipes", "copy", "train_distil", "--out", tmp_path).code == 0
    (tmp_path / "answers.sh").write_text("mine\n")
    told = call("recipes", "copy", "train_distil_small", "--out", tmp_path)
    assert told.code == 2
    assert "answers.sh already exists" in told.err
    assert (tmp_path / "answers.sh").read_text() == "mine\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian_soft"], "there is no recipe 'trian_soft'; did you mean 'train_soft'?"),
        (["zzz"], "`draftsmith recipes` lists them"),
        ([], "NAMES must be given. Example: draftsmith recipes copy train_soft"),
    ],
)
def test_a_name_that_is_none_is_told(call, tmp_path, words, expected):
    told = call("recipes", "copy", *words, "--out", tmp_path / "new")
    assert told.code == 2
    assert expected in told.err
    assert not (tmp_path / "new").exists()


def test_a_file_where_the_folder_should_be_is_told(call, tmp_path):
    (tmp_path / "out").write_text("")
    told = call("recipes", "copy", "plan", "--out", tmp_path / "out")
    assert told.code == 2
    assert "is a file; name a folder with --out" in told.err


def test_recipes_are_listed_and_copied_from_an_installed_wheel(tmp_path):
    source = tmp_path / "source"
    for folder in ("infer", "retrieval", "train", "recipes"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                copied = source / path.relative_to(ROOT)
                copied.parent.mkdir(parents=True, exist_ok=True)
                copied.write_bytes(path.read_bytes())
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path]
    built = subprocess.run([*map(str, pip), str(source)], capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    installed = tmp_path / "installed"
    zipfile.ZipFile(next(tmp_path.glob("draftsmith-*.whl"))).extractall(installed)
    env = os.environ | {"PYTHONPATH": str(installed)}
    program = (
        "import sys, draftsmith.recipes.commands.recipes as ours\nassert ours.__file__.startswith(sys.argv.pop(1))\n"
        "from draftsmith.recipes.cli.main import main\nmain()"
    )
    words = [sys.executable, "-c", program, installed, "recipes"]
    listed = subprocess.run([*map(str, words), "--json"], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert [one["name"] for one in json.loads(listed.stdout)["recipes"]] == SCRIPTS
    copied = subprocess.run([*map(str, words), "copy", "train_soft"], capture_output=True, text=True, env=env,
                            cwd=tmp_path)  # fmt: skip
    assert copied.returncode == 0, copied.stderr
    assert os.access(tmp_path / "train_soft.sh", os.X_OK)
    assert (tmp_path / "train_soft.yaml").is_file()
