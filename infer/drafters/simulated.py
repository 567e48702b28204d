"""Drafts of a chosen acceptance at the real cost of a draft model, so that a draft can be timed before it is trained.

The inner drafter's passes are run, and its chain is replaced by the plain answer. A share of the tokens is made wrong,
each by its own random number, so that acceptance is as chosen at every depth. For measuring only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from draftsmith.infer.contract.draft import Draft
from draftsmith.infer.contract.protocols import (
    Budget,
    Drafter,
    Feedback,
    PassTimer,
    Target,
    Verdict,
    drafts_unread,
)
from draftsmith.infer.contract.rng import uniform
from draftsmith.infer.contract.row import Row
from draftsmith.infer.costs.policy import Policy


class SimulatedDrafter:
    """Takes the time of `inner`, drafts from the answers; `acceptance` is the share of right tokens."""

    def __init__(self, inner: Drafter, acceptance: float = 1.0) -> None:
        if not 0 <= acceptance <= 1:
            raise ValueError(f"acceptance must lie between 0 and 1, not {acceptance}")
        self.inner = inner
        self.name = inner.name
        self.features = inner.features
        self.drafts_unread = drafts_unread(inner)
        self.origin = ""
        self.calibration = getattr(inner, "calibration", "auto")
        self.costs = getattr(inner, "costs", "auto")
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
        """Add plain answers: token ids by row key."""
        self._answers.update(answers)

    def pass_timers(self) -> dict[str, PassTimer]:
        return self.inner.pass_timers()

    def bind(self, target: Target) -> None:
        self._vocab_size = target.vocab_size
        self.inner.bind(target)
        self.features = self.inner.features

    def open(self, rows: Sequence[Row]) -> None:
        self.inner.open(rows)

    def read(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        self.inner.read(rows, feedback)

    def close(self, rows: Sequence[Row]) -> None:
        self.inner.close(rows)

    def abandon(self, rows: Sequence[Row]) -> None:
        self.inner.abandon(rows)

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget], policy: Policy | None = None) -> list[Draft]:
        drafts = self.inner.propose(rows, budgets, policy)
        if not all(draft.is_chain() for draft in drafts):
            raise ValueError("only chains can be simulated, and the draft model proposed a tree: give it top_k=1")
        return [Draft().chain(self._chain(row, len(draft)), self.name) for row, draft in zip(rows, drafts)]

    def _chain(self, row: Row, length: int) -> list[int]:
        done = len(row.new_ids)
        answer = self._answers[row.key][done : done + length]
        chances = [uniform(row.settings.seed, row.key, done + i, "rehearsed") for i in range(len(answer))]
        return [t if c < self.acceptance else (t + 1) % self._vocab_size for t, c in zip(answer, chances)]

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        self.inner.observe(rows, verdicts, feedback)
