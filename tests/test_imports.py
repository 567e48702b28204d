"""Arrows point one way, files stay small, and importing costs nothing."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("infer", "retrieval", "train", "recipes")
MAY_IMPORT = {
    "infer": {"infer"},
    "retrieval": {"retrieval", "infer"},
    "train": {"train", "infer"},
    "recipes": {"recipes", "infer", "retrieval", "train"},
}
# The rooms of infer/ and of train/, and what each may import of the others. Whatever is not named here is forbidden.
ROOMS = {
    "infer": {
        "contract": set(),
        "files": set(),
        "rules": {"contract"},
        "text": {"contract", "files"},
        "costs": {"contract", "files"},
        "models": {"contract", "files", "text", "costs"},
        "heads": {"contract", "files", "text", "models"},
        "drafters": {"contract", "files", "text", "costs", "models", "heads", "rules"},
        "engine": {"contract", "files", "text", "costs", "models", "rules", "drafters"},
        "answers": {"contract", "files", "text", "rules", "engine"},
        "serving": {"contract", "text", "rules", "engine", "answers"},
        "measure": {"contract", "files", "text", "costs", "models", "heads", "rules", "drafters", "engine", "answers"},
    },
    "train": {
        "data": set(),
        "drafts": {"data"},
        "teacher": {"data", "drafts"},
        "objectives": {"data", "drafts", "teacher"},
        "export": {"drafts"},
        "run": {"data", "drafts", "teacher", "objectives", "export"},
    },
}
# Source files in one folder: more is a drawer with labels. `__init__.py` is not counted.
MOST_FILES = 15
DRAWERS = {"utils", "util", "common", "helpers", "base", "misc"}
# Imported where they are used. Lightning's classes are parents in train/, so there alone it comes with the module.
OPTIONAL = {
    "lightning",
    "pytorch_lightning",
    "datasets",
    "peft",
    "deepspeed",
    "faiss",
    "fastchat",
    "ninja",
    "matplotlib",
    "starlette",
    "uvicorn",
    "prometheus_client",
    "prompt_toolkit",
    "openai",
    "ray",
}


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def dotted(path: Path) -> str:
    return "draftsmith." + path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


def imported(path: Path) -> Iterator[str]:
    """Dotted names that `path` imports, wherever in the file the import stands."""
    package = dotted(path).split(".") if path.name == "__init__.py" else dotted(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (start, node.module) if part)
            yield from (f"{source}.{alias.name}" for alias in node.names)


def part_of_ours(name: str) -> str | None:
    """The folder that an imported name belongs to, None for other people's modules."""
    parts = name.split(".")
    return parts[1] if parts[0] == "draftsmith" and len(parts) > 1 else None


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_only_what_its_arrows_allow(folder):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(folder)
        for name in imported(path)
        if part_of_ours(name) not in {None, *MAY_IMPORT[folder]}
    ]
    assert wrong == []


def room_of(name: str, folder: str) -> str | None:
    """The room of `folder` that a dotted name of ours belongs to, None for anything else."""
    parts = name.split(".")
    return parts[2] if parts[:2] == ["draftsmith", folder] and len(parts) > 2 and parts[2] in ROOMS[folder] else None


def upward_imports(folder: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(folder)
        for name in imported(path)
        if (inside := room_of(dotted(path), folder))
        and room_of(name, folder) not in {None, inside, *ROOMS[folder][inside]}
    ]


def drawers(folder: str) -> list[str]:
    """Folders with more than MOST_FILES source files."""
    counts: dict[Path, int] = {}
    for path in modules(folder):
        counts[path.parent] = counts.get(path.parent, 0) + (path.name != "__init__.py")
    return [f"{at.relative_to(ROOT)} has {count} files" for at, count in counts.items() if count > MOST_FILES]


@pytest.mark.parametrize("folder", ROOMS)
def test_every_module_of_a_folder_with_rooms_stands_in_one(folder):
    assert {path.relative_to(ROOT / folder).parts[0] for path in modules(folder)} == {*ROOMS[folder], "__init__.py"}


@pytest.mark.parametrize("folder", ROOMS)
def test_a_room_imports_only_the_rooms_below_it(folder):
    assert upward_imports(folder) == []


def test_a_planted_upward_import_and_a_planted_drawer_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    room = tmp_path / "infer" / "models"
    room.mkdir(parents=True)
    (room / "planted.py").write_text("def f():\n    from draftsmith.infer.measure import bench\n")
    (room / "allowed.py").write_text("from draftsmith.infer.contract.row import Row\n")
    assert upward_imports("infer") == ["infer/models/planted.py imports draftsmith.infer.measure.bench"]
    assert drawers("infer") == []
    for number in range(MOST_FILES - 1):
        (room / f"file{number}.py").write_text('"""One more."""\n')
    assert drawers("infer") == [f"infer/models has {MOST_FILES + 1} files"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_folder_is_a_drawer(folder):
    assert drawers(folder) == []


def test_the_arrow_scan_sees_every_form_of_import(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "infer" / "measure" / "planted.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import draftsmith.train\n"
        "from draftsmith import recipes\n"
        "def f():\n    from draftsmith.retrieval.pld import PromptLookup\n"
        "from ...train.data import packing\n"
    )
    assert {part_of_ours(name) for name in imported(path)} == {"train", "recipes", "retrieval"}
    assert list(imported(path)).count("draftsmith.train.data.packing") == 1


@pytest.mark.parametrize("folder", [*FOLDERS, "tests"])
def test_no_file_is_longer_than_400_lines(folder):
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in modules(folder)}
    assert {name: lines for name, lines in long.items() if lines > 400} == {}


def test_no_module_is_a_drawer():
    assert [path for folder in FOLDERS for path in modules(folder) if path.stem in DRAWERS] == []


def test_no_class_name_is_used_twice():
    places: dict[str, list[str]] = {}
    for path in (path for folder in FOLDERS for path in modules(folder)):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


def test_every_module_says_what_it_is():
    paths = [path for folder in FOLDERS for path in modules(folder)]
    assert [path for path in paths if not ast.get_docstring(ast.parse(path.read_text()))] == []


PROBE = """
import importlib, json, os, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
def settings():
    return [str(torch.get_default_dtype()), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
            torch.random.initial_seed(), sys.path[:]]
environment, before, theirs = dict(os.environ), settings(), set(sys.modules)
for folder, names in json.loads(sys.argv[1]).items():
    for name in names:
        importlib.import_module(name)
    changed = sorted(key for key in {*environment, *os.environ} if environment.get(key) != os.environ.get(key))
    print(json.dumps({folder: {
        "environment": changed,
        "settings": settings() == before,
        "started": torch.distributed.is_initialized() or torch.cuda.is_initialized(),
        "loaded": sorted({name.partition(".")[0] for name in {*sys.modules} - theirs}),
    }}))
"""


@pytest.fixture(scope="module")
def imports():
    """What importing every module of a folder does. In one process, with train/ last: there alone more is allowed."""
    folders = sorted(FOLDERS, key="train".__eq__)
    names = {folder: [dotted(path) for path in modules(folder) if "studies" not in path.parts] for folder in folders}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(names)], capture_output=True, text=True, timeout=300, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return {folder: found for line in done.stdout.splitlines() for folder, found in json.loads(line).items()}


@pytest.mark.parametrize("folder", FOLDERS)
def test_importing_sets_nothing_starts_nothing_and_loads_no_optional_package(folder, imports):
    found = imports[folder]
    # Lightning brings packages of its own, and so speaks for itself in train/.
    allowed = {"lightning", "pytorch_lightning", "datasets", "matplotlib"} if folder == "train" else set()
    # Lightning turns torch's check for CUDA into one that starts no driver.
    theirs = {"PYTORCH_NVML_BASED_CUDA_CHECK"} if folder == "train" else set()
    assert set(found["environment"]) <= theirs
    assert found["settings"]
    assert not found["started"]
    assert set(found["loaded"]) & (OPTIONAL - allowed) == set()
