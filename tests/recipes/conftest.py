"""The command line in this process, on tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from draftsmith.recipes.cli.main import run


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
