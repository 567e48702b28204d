"""REST's own rule by its own package, as a drafter to measure against: draftretriever on PyPI, a Rust extension.

The newest 16, 15, ..., 2 tokens are looked up; the first span that is found gives the draft, and no other counts. Its
index has 16-bit ids and knows no documents. For benchmarks alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.protocols import Budget, Feedback, PassTimer, Target, Verdict
from draftsmith.infer.contract.row import Row


class DraftRetriever:
    """`seconds` lists what each call into the package took, apart from what is done here with its answer."""

    name = "draftretriever"
    features: tuple[str, ...] = ()
    forward_seconds = 0.0
    bytes_moved = 0
    origin = ""

    def __init__(self, index: Path, nodes: int = 64, longest: int = 16, shortest: int = 2) -> None:
        import draftretriever

        self.nodes = nodes
        self.spans = range(longest, shortest - 1, -1)
        self.seconds: list[float] = []
        self._reader: Any = draftretriever.Reader(str(index))

    @classmethod
    def build(cls, index: Path, documents: Iterable[list[int]], vocab_size: int, nodes: int) -> DraftRetriever:
        import draftretriever

        if vocab_size > 1 << 16:
            raise ValueError(f"draftretriever keeps ids in 16 bits, and this vocabulary has {vocab_size}")
        writer = draftretriever.Writer(str(index), vocab_size)
        for document in documents:
            writer.add_entry(document)
        writer.finalize()
        return cls(index, nodes)

    def pass_timers(self) -> dict[str, PassTimer]:
        return {}

    def bind(self, target: Target) -> None:
        pass

    def open(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        pass

    def close(self, rows: Sequence[Row]) -> None:
        pass

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        pass

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget]) -> list[Draft]:
        return [self._draft(row.ids, budget) for row, budget in zip(rows, budgets)]

    def _draft(self, ids: list[int], budget: Budget) -> Draft:
        draft = Draft()
        for path in self._paths(ids) if budget.depth else ():
            parent = ROOT
            for token in path[: budget.depth]:
                if draft.child(parent, token) is None and len(draft) >= budget.nodes:
                    break
                parent = draft.outright(parent, token, self.name)
        return draft

    def _paths(self, ids: list[int]) -> list[list[int]]:
        began = time.perf_counter()
        paths: list[list[int]] = []
        for span in self.spans:
            if span <= len(ids):
                paths = self._reader.search(ids[-span:], choices=self.nodes)[0]
                if paths:
                    break
        self.seconds.append(time.perf_counter() - began)
        # Unused places of its paths are filled with negative numbers.
        return [[token for token in path if token >= 0] for path in paths]
