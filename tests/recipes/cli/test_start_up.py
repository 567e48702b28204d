"""Help and `store info` start quickly: they import none of the heavy packages."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest

from draftsmith.recipes.cli.main import COMMANDS, run

HEAVY = ["torch", "transformers", "lightning", "numba", "pyarrow", "tokenizers", "scipy", "matplotlib", "datasets"]
ALL_HELPS = """
import contextlib, io, json, sys
from draftsmith.recipes.cli.main import COMMANDS, run
found = {}
for name in COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = run([*name.split(), "--help"])
    assert code == 0 and "--config" in printed.getvalue(), name
    found[name] = sorted(module for module in sys.modules if module in HEAVY)
print(json.dumps(found))
"""
STORE_INFO = """
import json, sys
from draftsmith.recipes.cli.main import run
assert run(["store", "info", sys.argv[1]]) == 0
print(json.dumps([module for module in ("torch", "transformers", "lightning") if module in sys.modules]))
"""


@pytest.fixture(scope="module")
def store_folder(folders, tmp_path_factory):
    at = tmp_path_factory.mktemp("store")
    (at / "text.jsonl").write_text(json.dumps({"text": "one two three four"}) + "\n")
    words = ["store", "build", "rest", "--data", at / "text.jsonl", "--out", at / "store", "--content", "all"]
    assert run([*map(str, words), "--target", folders.target, "--template", "plain"]) == 0
    return at / "store"


def said(code, *words):
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_no_command_s_help_imports_a_heavy_package():
    found = said(f"HEAVY = {HEAVY}" + ALL_HELPS)
    assert set(found) == set(COMMANDS)
    assert {name: modules for name, modules in found.items() if modules} == {}


def test_store_info_imports_no_torch(store_folder):
    assert said(STORE_INFO, str(store_folder)) == []


def cpu_seconds(*words):
    """The least user and system time of five runs: noise only adds."""
    found = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "draftsmith.recipes", *words], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_help_takes_less_than_0_7_seconds_of_cpu(name):
    assert cpu_seconds(*name.split(), "--help") < 0.7


@pytest.mark.slow
def test_store_info_takes_less_than_0_7_seconds_of_cpu(store_folder):
    assert cpu_seconds("store", "info", str(store_folder)) < 0.7
