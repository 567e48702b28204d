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


def test_the_arrow_scan_sees_every_form_of_import(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "infer" / "measure" / "planted.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import draftsmith.train\n"
        "from draftsmith import recipes\n"
        "def f():\n    from draftsmith.retrieval.pld import PromptLookup\n"
        "from ...train import packing\n"
    )
    assert {part_of_ours(name) for name in imported(path)} == {"train", "recipes", "retrieval"}
    assert list(imported(path)).count("draftsmith.train.data.packing") == 1


@pytest.mark.parametrize("folder", [*FOLDERS, "tests"])
def test_no_file_is_longer_than_400_lines(folder):
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in modules(folder)}
    assert {name: lines for name, lines in long.items() if lines > 400} == {}


def test_no_module_is_a_drawer():
    assert [path for folder in FOLDERS for path in modules(folder) if path.stem in DRAWERS] == []


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
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
changed = sorted(key for key in {*environment, *os.environ} if environment.get(key) != os.environ.get(key))
print(json.dumps({
    "environment": changed,
    "settings": settings() == before,
    "started": torch.distributed.is_initialized() or torch.cuda.is_initialized(),
    "loaded": sorted({name.partition(".")[0] for name in {*sys.modules} - theirs}),
}))
"""


@pytest.mark.parametrize("folder", FOLDERS)
def test_importing_sets_nothing_starts_nothing_and_loads_no_optional_package(folder):
    names = [dotted(path) for path in modules(folder)]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(names)], capture_output=True, text=True, timeout=300, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # Lightning brings packages of its own, and so speaks for itself in train/.
    allowed = {"lightning", "pytorch_lightning", "datasets", "matplotlib"} if folder == "train" else set()
    # Lightning turns torch's check for CUDA into one that starts no driver.
    theirs = {"PYTORCH_NVML_BASED_CUDA_CHECK"} if folder == "train" else set()
    assert set(found["environment"]) <= theirs
    assert found["settings"]
    assert not found["started"]
    assert set(found["loaded"]) & (OPTIONAL - allowed) == set()
