"""Measured pass-latency model, used to size drafts.

A pass is packed: its rows may have different numbers of tokens, and none is padded to the longest. If row i has q_i
tokens behind c_i committed ones, the pass takes

    f(sum q_i) + per_row * rows + per_seen * sum c_i + per_pair * sum q_i c_i     seconds.

f is linear between measured numbers of tokens: weights are read once per pass, matrix products grow with the tokens,
attention begins anew for every row, and grows with the context. A pass whose total is padded to a bucket costs what the
bucket costs. infer/costs/timing.py measures and fits these; infer/costs/policy.py spends them.

Legend: N passes, P measured points.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from draftsmith.infer.costs.identity import TargetIdentity, machine_text
from draftsmith.infer.files.atomic import load_versioned

# 3: passes are packed; format 2 holds passes that were padded to their longest row.
FORMAT = 3
WRITTEN_BY = "`draftsmith plan` or `draftsmith calibrate`"

Count = TypeVar("Count", int, float)


def padded(tokens: Count, buckets: Sequence[Count]) -> Count:
    """The first bucket that holds `tokens`; `tokens` itself if none does."""
    return next((bucket for bucket in buckets if bucket >= tokens), tokens)


@dataclass(frozen=True, slots=True)
class PassCost:
    """Seconds of one kind of pass: `seconds[i]` for `tokens[i]` (ascending), and what rows and context add.

    `buckets`: the totals of tokens that a pass is padded to (see `measured_buckets` in infer/models/pass_timer.py).
    """

    tokens: Sequence[float]
    seconds: Sequence[float]
    per_seen: float = 0.0
    per_pair: float = 0.0
    buckets: Sequence[float] = ()
    per_row: float = 0.0

    def __call__(self, tokens: float, seen: float = 0.0, pairs: float = 0.0, rows: float = 1.0) -> float:
        """Seconds for `tokens` tokens of all rows together, behind `seen` committed ones of all rows together.

        `pairs`: the sum over the rows of new tokens times committed ones.
        """
        beside = self.per_row * rows + self.per_seen * seen + self.per_pair * pairs
        return self._weights(padded(float(tokens), self.buckets)) + beside

    def many(self, tokens_N: np.ndarray, seen: float, pairs_N: np.ndarray, rows: float) -> np.ndarray:
        """[N] the seconds of several passes of the same rows, behind the same committed tokens."""
        if self.buckets:
            tokens_N = np.array([padded(tokens, self.buckets) for tokens in tokens_N.tolist()])
        known_P, seconds_P = np.asarray(self.tokens, np.float64), np.asarray(self.seconds, np.float64)
        found_N: np.ndarray = np.interp(tokens_N, known_P, seconds_P)
        if len(known_P) > 1:
            slope = (seconds_P[-1] - seconds_P[-2]) / (known_P[-1] - known_P[-2])
            found_N += slope * np.maximum(tokens_N - known_P[-1], 0.0)
        return found_N + (self.per_row * rows + self.per_seen * seen + self.per_pair * pairs_N)

    def even(self, rows: int, tokens: int, context: float) -> float:
        """Seconds for `rows` rows of `tokens` tokens each, behind `context` committed ones each."""
        return self(rows * tokens, rows * context, rows * tokens * context, rows)

    def shared(self, rows: int) -> PassCost:
        """One row's part of the pass, if `rows` rows like it share every pass."""
        tokens, seconds = [count / rows for count in self.tokens], [one / rows for one in self.seconds]
        return replace(self, tokens=tokens, seconds=seconds, buckets=[bucket / rows for bucket in self.buckets])

    def _weights(self, total: float) -> float:
        """f; beyond the last point its last slope continues."""
        if total <= self.tokens[0] or len(self.tokens) == 1:
            return self.seconds[0]
        above = min(bisect_left(self.tokens, total), len(self.tokens) - 1)
        x0, x1 = self.tokens[above - 1], self.tokens[above]
        y0, y1 = self.seconds[above - 1], self.seconds[above]
        return y0 + (y1 - y0) * (total - x0) / (x1 - x0)


@dataclass(frozen=True, slots=True)
class Costs:
    """A machine's pass costs by name: "target", and the names of a drafter's `pass_timers`.

    `overhead`: seconds of a step outside all forward passes. `asking`: seconds to propose for one row, of a
    drafter with passes if it runs none. `target`: whose passes they are; a file always has one.
    """

    passes: Mapping[str, PassCost]
    overhead: float = 0.0
    machine: Mapping[str, Any] = field(default_factory=dict)
    target: TargetIdentity | None = None
    asking: float = 0.0

    def of(self, name: str) -> PassCost:
        if name not in self.passes:
            raise ValueError(f"no costs of {name!r} were measured, only of {', '.join(self.passes)}: calibrate again")
        return self.passes[name]

    def shared(self, rows: int) -> Costs:
        """One row's part, if `rows` rows like it share every pass."""
        passes = {name: cost.shared(rows) for name, cost in self.passes.items()}
        return replace(self, passes=passes, overhead=self.overhead / rows)

    def describe(self) -> str:
        """Target and machine in a few words."""
        name = self.target.name if self.target else "an unnamed target"
        return f"{name} on {machine_text(self.machine)}"

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "kind": "costs",
            "target": self.target.to_json() if self.target else None,
            "machine": dict(self.machine),
            "overhead": self.overhead,
            "asking": self.asking,
            "passes": {name: asdict(cost) for name, cost in self.passes.items()},
        }

    @classmethod
    def load(cls, path: str | Path) -> Costs:
        return load_versioned(path, "costs", FORMAT, cls._from_json, WRITTEN_BY)

    @classmethod
    def _from_json(cls, value: Mapping[str, Any]) -> Costs:
        passes = {name: PassCost(**one) for name, one in value["passes"].items()}
        if value["target"] is None:
            raise ValueError(f"it does not name its target: run {WRITTEN_BY} again")
        target = TargetIdentity.from_json(value["target"])
        # Files from before asking was measured have none.
        return cls(passes, float(value["overhead"]), value["machine"], target, float(value.get("asking", 0.0)))
