"""Planted faults: a function compiled again with one piece of its source changed."""

from __future__ import annotations

import inspect
import sys
import textwrap
from typing import Any

import pytest


def plant(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, sound: str, fault: str) -> None:
    """Replace `sound` by `fault` in the source of `owner.name`, which must hold it once."""
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(sound) == 1, f"{sound!r} is not in {name} once: plant the fault elsewhere"
    code = compile(
        "from __future__ import annotations\n" + source.replace(sound, fault), f"<planted in {name}>", "exec"
    )
    made: dict[str, Any] = {}
    exec(code, vars(sys.modules[function.__module__]), made)
    monkeypatch.setattr(owner, name, made[name])
