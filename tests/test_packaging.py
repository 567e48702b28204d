"""The package that a person installs holds everything that the checkout does."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("infer", "retrieval", "train", "recipes")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def source_folders() -> set[str]:
    """Every folder of ours that holds a Python module, as a path from the root."""
    modules = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return {path.parent.relative_to(ROOT).as_posix() for path in modules}


def source_files() -> set[str]:
    """What the wheel has to hold, as paths from the root."""
    kinds = ("*.py", "*.yaml", "*.sh", "*.j2", "*.css", "py.typed")
    found = (path for folder in FOLDERS for kind in kinds for path in (ROOT / folder).rglob(kind))
    return {path.relative_to(ROOT).as_posix() for path in found}


def test_packages_lists_exactly_the_folders_that_hold_modules():
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted("draftsmith." + folder.replace("/", ".") for folder in source_folders())


def test_every_package_folder_has_an_init_so_that_its_data_files_are_found():
    assert [folder for folder in source_folders() if not (ROOT / folder / "__init__.py").exists()] == []


def test_type_checkers_see_every_folder_under_the_one_name():
    links = {link.name: link.resolve() for link in (ROOT / ".types" / "draftsmith").iterdir()}
    assert links == {folder: ROOT / folder for folder in FOLDERS}


def test_constraints_name_every_dependency_that_the_tests_run_with():
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["train"], *extras["retrieval"], *extras["dev"]]
    pinned = re.findall(r"^([A-Za-z0-9._-]+)==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    missing = {plain_name(entry) for entry in wanted} - {plain_name(entry) for entry in pinned}
    assert missing == set()


def plain_name(requirement: str) -> str:
    return re.split(r"[<>=!~;\[ ]", requirement)[0].lower().replace("_", "-")


def test_every_packaged_yaml_can_be_read():
    for name in source_files():
        if name.endswith(".yaml"):
            assert yaml.safe_load((ROOT / name).read_text()), name


def test_ci_run_is_executable_and_runs_the_three_targets():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    text = script.read_text()
    assert all(target in text for target in ("make check", "make test", "make quickstart SCALE=smoke"))


def test_the_wheel_holds_every_module_recipe_and_type_marker(tmp_path):
    # A copy, so that nothing left over from an earlier build gets in and nothing is left behind.
    source = tmp_path / "source"
    for name in source_files() | {"pyproject.toml", "README.md", "LICENSE"}:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    built = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "-w",
            tmp_path,
            source,
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("draftsmith-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {f"draftsmith/{name}" for name in source_files()} <= held
    assert any(name.endswith("entry_points.txt") for name in held)
