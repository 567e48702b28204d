"""The wheel and the source distribution: what they hold, and that they work without the checkout."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("infer", "retrieval", "train", "recipes")
# Scripts that check our own claims: in the repository and the source distribution, not in the wheel.
STUDIES = "recipes/studies"
# A container is built from the repository.
DOCKER = "recipes/docker"
# Files beside the modules, not for the wheel: to read, to build with, to test.
BESIDE = ("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "LOG.md", "MANIFEST.in", "Makefile",
          "README.md", "constraints.txt", "pyproject.toml", ".ci/run")  # fmt: skip
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def files_of(*folders: str) -> set[str]:
    """Every file in the folders but caches, as a path from the root."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts}


def source_files() -> set[str]:
    """What the wheel has to hold: modules, recipes, templates, styles, type markers, and no studies."""
    return files_of(*FOLDERS) - files_of(STUDIES, DOCKER)


def source_folders() -> set[str]:
    """Every folder of the wheel that holds a Python module, as a path from the root."""
    return {Path(name).parent.as_posix() for name in source_files() if name.endswith(".py")}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout, so that earlier builds leave nothing in it and this one leaves nothing behind."""
    folder = tmp_path_factory.mktemp("packaging") / "source"
    for name in files_of(*FOLDERS, "tests", "docs") | set(BESIDE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def built(source):
    """The source distribution, and the wheel built from it."""
    return build(source)


def build(source, out="dist", *kinds):
    command = [sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", out, "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return source / out


def contents(dist):
    """Name -> hash of each file in the wheel in `dist`, its RECORD excepted."""
    (wheel,) = dist.glob("draftsmith-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith(".dist-info/RECORD")]
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in names}


def test_packages_lists_exactly_the_folders_that_hold_modules():
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted("draftsmith." + folder.replace("/", ".") for folder in source_folders())


def test_every_package_folder_has_an_init_so_that_its_data_files_are_found():
    assert [folder for folder in source_folders() if not (ROOT / folder / "__init__.py").exists()] == []


@pytest.mark.skipif(not (ROOT / ".types").exists(), reason="a source distribution holds no links: those are git's")
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


def test_the_citation_names_the_version_and_the_licence_of_the_package():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cited["version"], cited["license"]) == (PROJECT["project"]["version"], PROJECT["project"]["license"])


def test_the_wheel_holds_every_file_of_the_four_folders_and_nothing_else(built):
    held = {name for name in contents(built) if ".dist-info/" not in name}
    assert held == {f"draftsmith/{name}" for name in source_files()}
    kinds = {Path(name).suffix or Path(name).name for name in held}
    assert {".py", ".yaml", ".sh", ".j2", ".css", ".ipynb", ".typed"} <= kinds
    assert any(name.endswith("entry_points.txt") for name in contents(built))


def test_the_wheel_holds_no_study_and_needs_none(built):
    assert f"{STUDIES}/__init__.py" in files_of(*FOLDERS)
    assert [name for name in contents(built) if "studies" in name] == []
    modules = [name for name in source_files() if name.endswith(".py")]
    assert [
        name for name in modules if re.search(r"import.*\bstudies\b|\.studies\b.* import", (ROOT / name).read_text())
    ] == []


def test_the_source_distribution_holds_all_that_is_needed_to_read_build_and_test(built):
    (archive,) = built.glob("draftsmith-*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {member.name.partition("/")[2]: member for member in opened.getmembers() if member.isfile()}
    assert files_of(*FOLDERS, "tests", "docs") | set(BESIDE) <= set(held)
    assert files_of(STUDIES, DOCKER) <= set(held)
    assert held[".ci/run"].mode & 0o111


def test_the_wheel_is_the_same_whether_built_from_the_checkout_or_from_the_source_distribution(source, built):
    assert contents(build(source, "direct", "--wheel")) == contents(built)


def ran(command, **settings):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1500, **settings)


# Slow: into an empty environment, torch and all, through the package index that pip is set up with.


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A new environment with the wheel and its extras: a function that runs `draftsmith` from it in an empty folder."""
    folder = tmp_path_factory.mktemp("installed")
    (wheel,) = built.glob("draftsmith-*.whl")
    assert ran([sys.executable, "-m", "venv", folder / "venv"]).returncode == 0
    pip = [folder / "venv" / "bin" / "python", "-m", "pip", "-qq", "--disable-pip-version-check"]
    probe = ran([*pip, "download", "--no-deps", "--no-binary", ":none:", "-d", folder / "probe", "pyyaml"])
    if probe.returncode:
        pytest.skip(f"no package index can be reached: {probe.stderr.strip().splitlines()[-1]}")
    done = ran([*pip, "install", "-c", ROOT / "constraints.txt", f"{wheel}[train,retrieval]"])
    assert done.returncode == 0, done.stderr
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    env = kept | {"HOME": str(elsewhere), "DRAFTSMITH_CACHE": str(elsewhere / "cache"), "HF_HUB_OFFLINE": "1"}

    def draftsmith(*words):
        told = ran([folder / "venv" / "bin" / "draftsmith", *words], cwd=elsewhere, env=env)
        assert told.returncode == 0, told.stdout + told.stderr
        return told.stdout

    return draftsmith


@pytest.fixture(scope="module")
def quickstarted(installed):
    """What the smallest quickstart leaves in the folder `quickstart/smoke`."""
    return installed("quickstart", "--scale", "smoke")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_env_tells_what_is_installed_and_that_no_checkout_is(installed):
    facts = json.loads(installed("env", "--json"))
    assert facts["versions"]["draftsmith"]
    assert facts["git"] is None
    assert None not in facts["extras"]["train"].values()
    assert None not in facts["extras"]["retrieval"].values()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quickstart_runs_from_the_wheel(installed, quickstarted):
    assert "draftsmith bench" in quickstarted


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_generate_answers_with_a_drafter(installed, quickstarted):
    words = ("--target", "quickstart/smoke/target", "--prompt", "def add(a, b):", "--max_new_tokens", "12", "--json")
    plain, drafted = (json.loads(installed("generate", *words, *more).splitlines()[-1])
                      for more in ((), ("--drafters", "pld")))  # fmt: skip
    assert drafted["token_ids"] == plain["token_ids"]
    assert len(plain["token_ids"]) == 12


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_packaged_recipes_are_listed_and_copied(installed):
    assert "train_soft" in installed("recipes")
