"""What a drafter proposes along the target's answers, and what became of it: for drafters that are no model.

The drafter runs in the usual loop and is listened to. At every node that the answer passes through, all its candidates
are noted: with the confidence that they were proposed with, and whether they were the answer's next token. Nodes that
the answer does not pass through were never up for acceptance.

Recorded answers stand for the target, so no pass is paid for; a drafter that reads the target's states is given the
target itself, which says the same again. What drafters are is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.protocols import Budget, Drafter, Feedback, PassTimer, Target, Verdict
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.measure.calibrate.answers import Answered
from draftsmith.infer.measure.calibrate.reliability import Observations
from draftsmith.infer.models.recorded_target import RecordedTarget

Noted = tuple[int, int, float, bool]


class Listener:
    """Stands before a drafter and notes, per source, (prompt, rank, confidence, accepted) of every candidate that was
    up for acceptance. `numbers`: row key -> the prompt's number."""

    def __init__(self, drafter: Drafter, numbers: dict[str, int]) -> None:
        self.drafter = drafter
        self.numbers = numbers
        self.noted: dict[str, list[Noted]] = {}
        self.name = drafter.name
        self.features = drafter.features
        self.origin = drafter.origin
        self._drafts: dict[Row, Draft] = {}

    @property
    def forward_seconds(self) -> float:
        return self.drafter.forward_seconds

    @property
    def bytes_moved(self) -> int:
        return self.drafter.bytes_moved

    def pass_timers(self) -> dict[str, PassTimer]:
        return self.drafter.pass_timers()

    def bind(self, target: Target) -> None:
        self.drafter.bind(target)

    def open(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        self.drafter.open(rows, feedback)

    def close(self, rows: Sequence[Row]) -> None:
        self.drafter.close(rows)

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget]) -> list[Draft]:
        drafts = self.drafter.propose(rows, budgets)
        self._drafts = dict(zip(rows, drafts))
        return drafts

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        for row, verdict in zip(rows, verdicts):
            self._note(self.numbers[row.key], self._drafts[row], verdict)
        self.drafter.observe(rows, verdicts, feedback)

    def _note(self, number: int, draft: Draft, verdict: Verdict) -> None:
        """Committed token i follows node i - 1 of the path; what a stop cut off was not up for acceptance."""
        for parent, token in zip((ROOT, *verdict.path), verdict.committed):
            for rank, trial in enumerate(draft.trials.get(parent, ())):
                noted = (number, rank, trial.confidence, draft.tokens[trial.node] == token)
                self.noted.setdefault(trial.source, []).append(noted)


def listen(
    drafter: Drafter,
    target: Target,
    answers: Sequence[Answered],
    settings: Settings,
    stops: Stops,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Observations]:
    """Observations per source of `drafter`, which is bound to `target` already."""
    judge = target
    if not drafter.features:
        said = {one.key: one.answer for one in answers}
        judge = RecordedTarget(said, target.vocab_size, target.tokenizer, sampled=not settings.greedy)
    listener = Listener(drafter, {one.key: one.number for one in answers})
    for done, one in enumerate(answers, start=1):
        ends = stops if drafter.features else Stops(len(one.answer))
        generate(judge, listener, [Row(one.key, list(one.prompt), settings, ends, target.tokenizer)])
        if progress is not None:
            progress(done, len(answers))
    return {source: Observations(*(np.array(each) for each in zip(*some))) for source, some in listener.noted.items()}
