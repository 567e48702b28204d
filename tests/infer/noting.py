"""A drafter that notes its calls, and prompts with their plain answers. Not tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from draftsmith.infer.contract.draft import Draft
from draftsmith.infer.contract.protocols import Budget, Feedback
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.models.hf_target import HFTarget

VOCAB = 61


def plain(model: Any, ids: Sequence[int], count: int) -> list[int]:
    return Engine(HFTarget(model)).run([Row("0", list(ids), stops=Stops(count))])[0].token_ids


class Noting(Empty):
    """Proposes what `make(row, budget)` gives, and notes the rows of every call."""

    name = "noting"

    def __init__(self, make: Callable[[Row, Budget], Draft] = lambda row, budget: Draft()) -> None:
        self.make = make
        self.proposed: list[list[Row]] = []
        self.open_now: set[Row] = set()
        self.given: list[Feedback] = []

    def open(self, rows: Sequence[Row]) -> None:
        self.open_now |= set(rows)

    def close(self, rows: Sequence[Row]) -> None:
        self.open_now -= set(rows)

    def read(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        self.given += feedback

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget], policy: Any = None) -> list[Draft]:
        self.proposed.append(list(rows))
        return [self.make(row, budget) for row, budget in zip(rows, budgets)]


def prompts(count: int, long: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCAB, (long or 4 + 3 * i,), generator=generator).tolist() for i in range(count)]
