"""Three drafters that every measurement is compared with: an empty one, always right, always wrong.

Empty shows the overhead of our own step, the oracle the ceiling (every token accepted), the adversary the floor (every
token rejected). Oracle and adversary need the plain answers first: call `learn`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from draftsmith.infer.contract.arguments import at_least
from draftsmith.infer.contract.draft import Draft
from draftsmith.infer.contract.protocols import Budget, Feedback, PassTimer, Target, Verdict
from draftsmith.infer.contract.row import Row
from draftsmith.infer.costs.policy import Policy


class Empty:
    """Drafts nothing: plain decoding through the step."""

    name = "empty"
    features: tuple[str, ...] = ()
    forward_seconds = 0.0
    bytes_moved = 0
    origin = ""

    def pass_timers(self) -> dict[str, PassTimer]:
        return {}

    def bind(self, target: Target) -> None:
        pass

    def open(self, rows: Sequence[Row]) -> None:
        pass

    def read(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        pass

    def close(self, rows: Sequence[Row]) -> None:
        pass

    def abandon(self, rows: Sequence[Row]) -> None:
        pass

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget], policy: Policy | None = None) -> list[Draft]:
        return [Draft() for _ in rows]

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        pass


class ScriptedDrafter:
    """Drafts a chain from the plain answer; `shift` 0 gives the answer itself, 1 a wrong token at every position."""

    features: tuple[str, ...] = ()
    drafts_unread = True
    forward_seconds = 0.0
    bytes_moved = 0
    origin = ""

    def __init__(self, name: str, shift: int, num_draft_tokens: int) -> None:
        at_least(1, num_draft_tokens=num_draft_tokens)
        self.name = name
        self.shift = shift
        self.exact = shift == 0
        self.num_draft_tokens = num_draft_tokens
        self._answers: dict[str, Sequence[int]] = {}
        self._vocab_size = 0

    def learn(self, answers: Mapping[str, Sequence[int]]) -> None:
        """Add plain answers: token ids by row key."""
        self._answers.update(answers)

    def pass_timers(self) -> dict[str, PassTimer]:
        return {}

    def bind(self, target: Target) -> None:
        self._vocab_size = target.vocab_size

    def open(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if row.key not in self._answers:
                raise ValueError(f"{self.name} has no plain answer to {row.key}: pass it to learn() first")

    def read(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        pass

    def close(self, rows: Sequence[Row]) -> None:
        pass

    def abandon(self, rows: Sequence[Row]) -> None:
        pass

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget], policy: Policy | None = None) -> list[Draft]:
        drafts = []
        for row, budget in zip(rows, budgets):
            done = len(row.new_ids)
            ahead = self._answers[row.key][done : done + min(self.num_draft_tokens, budget.depth, budget.nodes)]
            drafts.append(Draft().chain([(token + self.shift) % self._vocab_size for token in ahead], self.name))
        return drafts

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        pass


def oracle(num_draft_tokens: int = 8) -> ScriptedDrafter:
    """The ceiling: drafts the plain answer itself."""
    return ScriptedDrafter("oracle", 0, num_draft_tokens)


def adversary(num_draft_tokens: int = 8) -> ScriptedDrafter:
    """The floor: drafts wrong tokens only."""
    return ScriptedDrafter("adversary", 1, num_draft_tokens)
