"""The command line in this process, on tiny models."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from draftsmith.recipes.cli.main import run

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@dataclass(frozen=True, slots=True)
class Told:
    """What a command left: exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The object on the last line; a command that failed has none."""
        assert self.code == 0, self.err
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Told]:
    """`call("generate", "--target", ...)` as a person would type it."""
    monkeypatch.delenv("DRAFTSMITH_TRACEBACK", raising=False)

    def call(*words: object) -> Told:
        capsys.readouterr()
        code = run([str(word) for word in words])
        told = capsys.readouterr()
        return Told(code, told.out, told.err)

    return call


@pytest.fixture
def rows_file(tmp_path: Path) -> Callable[..., str]:
    """Write rows as JSON Lines; returns the file's name."""

    def write(rows: Sequence[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`script("plan", ...)` runs a recipe's script, or one of another path, with the real command on its path; further
    keywords are its environment."""
    command = tmp_path / "bin" / "draftsmith"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m draftsmith.recipes "$@"\n')
    command.chmod(0o755)

    def script(name: str | Path, *words: object, **environment: object) -> subprocess.CompletedProcess[str]:
        path = name if isinstance(name, Path) else RECIPES / f"{name}.sh"
        env = os.environ | {"PATH": f"{command.parent}:{os.environ['PATH']}", "DRAFTSMITH_CACHE": str(tmp_path / "c")}
        env |= {key: str(value) for key, value in environment.items()}
        line = ["bash", *map(str, (path, *words))]
        return subprocess.run(line, capture_output=True, text=True, timeout=580, env=env, cwd=tmp_path)

    return script
