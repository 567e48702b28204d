"""How long a survey takes: predicted from a few passes before it starts, corrected by what each stage took."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from draftsmith.infer.costs.pass_costs import PassCost
from draftsmith.infer.costs.timing import expected_seconds, grid
from draftsmith.infer.measure.plan.shapes import Size, SurveyRequest

TARGET, LOOP, TRAINING = "the target", "the loop around the passes", "training"
# Tokens per row of a draft pass: 1 in chains, 2 (SmallLM's width) in trees, 4 to fit the slope.
DRAFT_TOKENS = (1, 2, 4)
TRAINED_TOKENS = 256
TRAINING_STEPS = 4
# The loop is timed on prompts of this length, with answers of this length, this often after a warm-up.
LOOP_CONTEXT, LOOP_TOKENS, LOOP_ROUNDS = 16, 24, 3


class Say(Protocol):
    """Prints a line of progress."""

    def __call__(self, line: str, last: bool = False) -> None: ...


def loop_lengths(asked: SurveyRequest) -> list[int]:
    """The draft lengths that the loop is timed with."""
    return sorted({2, max(2, min(8, max(asked.nodes)))})


@dataclass(slots=True)
class SurveySchedule:
    """The stages of a survey and the seconds that each should take; prints the time left."""

    say: Say
    clock: Callable[[], float] = time.perf_counter
    stages: dict[str, float] = field(default_factory=dict)
    limit: float = math.inf
    now: str = ""
    _began: float = 0.0
    _spent: float = 0.0
    _expected: float = 0.0

    def plan(
        self, asked: SurveyRequest, sizes: Mapping[str, Size], cost: PassCost, tokens: Sequence[int], seconds: float
    ) -> None:
        """Predict every stage from a rough `cost` of the target's passes; ValueError if `seconds` are too few."""
        shares = {name: sizes[name].multiplied / sizes["target"].multiplied for name in asked.timed}
        first, least = next(iter(shares)), 0.0
        for name, share in {TARGET: 1.0, **shares}.items():
            shapes = grid(asked.batch_sizes, tokens if name == TARGET else DRAFT_TOKENS, asked.contexts)
            each = {("", shape): share * cost.even(shape.rows, shape.tokens, shape.context) for shape in shapes}
            fewest, self.stages[name] = expected_seconds(each)
            least += fewest
            if name == first:
                self.stages[LOOP] = _loop_seconds(asked, cost, share)
        if least > seconds:
            raise ValueError(
                f"--seconds {seconds:g} are too few: timing the passes takes about {least:.0f} s or more; give "
                f"--seconds {math.ceil(least / 40) * 60}, or smaller --batch_sizes, --contexts, --lengths or --shapes"
            )
        self.limit = seconds
        slower = max(1.0, sum(taken for name, taken in self.stages.items() if name != LOOP) / seconds)
        self.stages = {name: taken / (1.0 if name == LOOP else slower) for name, taken in self.stages.items()}
        self.stages[TRAINING] = 3 * TRAINING_STEPS * shares[first] * cost.even(1, TRAINED_TOKENS, min(asked.contexts))
        self.say(
            f"this takes about {_minutes(sum(self.stages.values()))}; timing the passes ends after "
            f"{_minutes(seconds)} at most (--seconds)",
            last=True,
        )

    def begin(self, stage: str) -> float:
        """Start a stage; returns the seconds that its timing may take: its share of what is left of the limit."""
        self._finish()
        waiting = list(self.stages)[list(self.stages).index(stage) :]
        timed = {name: self.stages[name] for name in waiting if name not in (LOOP, TRAINING)}
        self.now, self._began = stage, self.clock()
        self(None)
        return self.limit * timed[stage] / sum(timed.values()) if stage in timed else math.inf

    def __call__(self, left_s: float | None) -> None:
        """Print the time left, given that of this stage, or None where only its prediction is known."""
        later = list(self.stages)[list(self.stages).index(self.now) + 1 :]
        pace = self._spent / self._expected if self._expected else 1.0
        if left_s is None:
            left_s = max(self.stages[self.now] * pace - (self.clock() - self._began), 0.0)
        left_s += pace * sum(self.stages[stage] for stage in later)
        place = list(self.stages).index(self.now) + 1
        what = self.now if self.now in (LOOP, TRAINING) else f"passes of {self.now}"
        self.say(f"{place}/{len(self.stages)} {what}: about {_minutes(left_s)} left")

    def end(self) -> None:
        self._finish()
        self.say(f"measured in {_minutes(self._spent)}", last=True)

    def _finish(self) -> None:
        """Take what the current stage took into the pace."""
        if self.now:
            taken = self.clock() - self._began
            self._spent += taken
            if self.now not in (LOOP, TRAINING):
                self.limit = max(self.limit - taken, 0.0)
            self._expected += self.stages[self.now]
            self.now = ""


def _loop_seconds(asked: SurveyRequest, cost: PassCost, share: float) -> float:
    """Of the warm-up, the rounds and the answers that drafts learn from."""
    context = min(LOOP_CONTEXT, *asked.contexts)
    total = 0.0
    for rows in {min(asked.batch_sizes), max(asked.batch_sizes)}:
        prompt = cost.even(rows, context, 0)
        plain = prompt + LOOP_TOKENS * cost.even(rows, 1, context)
        total += (LOOP_ROUNDS + 2) * plain
        for length in loop_lengths(asked):
            step = cost.even(rows, length + 1, context) + length * share * cost.even(rows, 1, context)
            # Half of the drafted tokens are right: about two tokens a step.
            total += (LOOP_ROUNDS + 1) * ((1 + share) * prompt + LOOP_TOKENS / 2 * step)
    return total


def _minutes(seconds: float) -> str:
    """For people: seconds below two minutes, minutes above."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min".replace(".0 ", " ")
