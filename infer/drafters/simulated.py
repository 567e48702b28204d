"""A draft model that runs its passes and is told what to say: real time at any acceptance, before it is trained.

The chain that the inner drafter proposes is replaced, token by token, by the plain answer; a share of the tokens is
spoiled, each by a number of its own, so that acceptance comes out as asked at every depth. For measuring only: it is
the oracle (controls.py) with a price. How the inner drafter drafts is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from draftsmith.infer.contract.draft import Draft
from draftsmith.infer.contract.protocols import Budget, Drafter, Feedback, PassTimer, Target, Verdict
from draftsmith.infer.contract.rng import uniform
from draftsmith.infer.contract.row import Row


class SimulatedDrafter:
    """`inner` pays, the answers speak; `acceptance` is the share of drafted tokens that are right."""

    def __init__(self, inner: Drafter, acceptance: float = 1.0) -> None:
        if not 0 <= acceptance <= 1:
            raise ValueError(f"acceptance is a share of tokens, from 0 to 1, not {acceptance}")
        self.inner = inner
        self.name = inner.name
        self.features = inner.features
        self.origin = ""
        self.acceptance = acceptance
        self._answers: dict[str, Sequence[int]] = {}
        self._vocab_size = 0

    @property
    def forward_seconds(self) -> float:
        return self.inner.forward_seconds

    @property
    def bytes_moved(self) -> int:
        return self.inner.bytes_moved

    def learn(self, answers: Mapping[str, Sequence[int]]) -> None:
        """Take the plain answers, token ids by row key."""
        self._answers.update(answers)

    def pass_timers(self) -> dict[str, PassTimer]:
        return self.inner.pass_timers()

    def bind(self, target: Target) -> None:
        self._vocab_size = target.vocab_size
        self.inner.bind(target)

    def open(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        self.inner.open(rows, feedback)

    def close(self, rows: Sequence[Row]) -> None:
        self.inner.close(rows)

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget]) -> list[Draft]:
        drafts = self.inner.propose(rows, budgets)
        if not all(draft.is_chain() for draft in drafts):
            raise ValueError("only chains can be rehearsed, and the draft model proposed a tree: give it top_k=1")
        return [Draft().chain(self._line(row, len(draft)), self.name) for row, draft in zip(rows, drafts)]

    def _line(self, row: Row, length: int) -> list[int]:
        done = len(row.new_ids)
        said = self._answers[row.key][done : done + length]
        chances = [uniform(row.settings.seed, row.key, done + i, "rehearsed") for i in range(len(said))]
        return [t if c < self.acceptance else (t + 1) % self._vocab_size for t, c in zip(said, chances)]

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        self.inner.observe(rows, verdicts, feedback)
