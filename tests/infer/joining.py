"""Rows that join and leave without an engine, for tests of single calls. Not tests."""

from __future__ import annotations

from collections.abc import Sequence

from draftsmith.infer.contract.protocols import Drafter, Target
from draftsmith.infer.contract.row import Row


def admit(target: Target, drafter: Drafter, rows: Sequence[Row], chunk: int = 512) -> None:
    """Let `rows` join, and read all of them but their newest tokens."""
    target.admit(rows, drafter.features)
    drafter.open(rows)
    while any(target.unread(row) for row in rows):
        drafter.read(rows, target.prefill(rows, chunk))


def release(target: Target, drafter: Drafter, rows: Sequence[Row]) -> None:
    target.release(rows)
    drafter.close(rows)
