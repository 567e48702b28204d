"""Draws from residuals branch instead of being drawn, so that all outcomes can be enumerated."""

from __future__ import annotations

import enumeration as en
import pytest

import draftsmith.infer.rules.token as token_module
import draftsmith.infer.rules.traversal as traversal_module


@pytest.fixture(autouse=True)
def _branch(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (token_module, traversal_module):
        monkeypatch.setattr(module, "draw_by_inversion", en.draw_by_inversion)
