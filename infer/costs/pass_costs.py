"""What forward passes cost on one machine: measured once, asked at every step by whoever decides how much to draft.

A pass of R rows with Q tokens each behind C committed ones takes

    f(R * Q) + per_seen * R * C + per_pair * R * Q * C     seconds,

f linear between measured numbers of tokens: the weights are read once whatever is asked of them, then matrix products
grow with the tokens, and attention with what each of them sees. Q is what the device is given: a pass that is padded
to one of the lab's `buckets` costs what the bucket costs. How it is measured and fitted stands in
infer/costs/timing.py; which probabilities it is weighed against, in infer/costs/policy.py.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1


def padded(tokens: int, buckets: Sequence[int]) -> int:
    """What a row with so many tokens is padded to: the first bucket that holds them, or nothing."""
    return next((bucket for bucket in buckets if bucket >= tokens), tokens)


@dataclass(frozen=True, slots=True)
class PassCost:
    """Seconds of one kind of pass: `tokens` ascending with their `seconds`, and what the context adds.

    `buckets` are the padded numbers of tokens of a row (see liked_buckets in infer/models/cached_lm.py).
    """

    tokens: Sequence[int]
    seconds: Sequence[float]
    per_seen: float = 0.0
    per_pair: float = 0.0
    buckets: Sequence[int] = ()

    def __call__(self, rows: int, tokens: int, context: float) -> float:
        """Of `rows` rows with `tokens` tokens each, behind `context` committed ones."""
        tokens = padded(tokens, self.buckets)
        seen = rows * context
        return self._weights(rows * tokens) + self.per_seen * seen + self.per_pair * tokens * seen

    def _weights(self, total: int) -> float:
        """f, carried on beyond the last point with its last slope."""
        if total <= self.tokens[0] or len(self.tokens) == 1:
            return self.seconds[0]
        above = min(bisect_left(self.tokens, total), len(self.tokens) - 1)
        x0, x1 = self.tokens[above - 1], self.tokens[above]
        y0, y1 = self.seconds[above - 1], self.seconds[above]
        return y0 + (y1 - y0) * (total - x0) / (x1 - x0)


@dataclass(frozen=True, slots=True)
class Costs:
    """A machine's passes by name: "target", and those that drafters name (see each drafter's `passes`).

    `overhead` are the seconds of a step outside all forward passes.
    """

    passes: Mapping[str, PassCost]
    overhead: float = 0.0
    machine: Mapping[str, Any] = field(default_factory=dict)

    def of(self, name: str) -> PassCost:
        if name not in self.passes:
            raise ValueError(f"no costs of {name!r} were measured, only of {', '.join(self.passes)}: calibrate again")
        return self.passes[name]

    def to_json(self) -> dict[str, Any]:
        passes = {name: asdict(cost) for name, cost in self.passes.items()}
        return {
            "format": FORMAT,
            "kind": "costs",
            "machine": dict(self.machine),
            "overhead": self.overhead,
            "passes": passes,
        }

    @classmethod
    def from_json(cls, said: Any, where: str) -> Costs:
        if not isinstance(said, dict) or said.get("kind") != "costs":
            raise ValueError(f"{where} holds no costs: `draftsmith plan` and `draftsmith calibrate` write them")
        if said.get("format") != FORMAT:
            raise ValueError(f"{where} has format {said.get('format')}, and this version reads {FORMAT}")
        try:
            passes = {name: PassCost(**one) for name, one in said["passes"].items()}
            return cls(passes, float(said["overhead"]), said["machine"])
        except (KeyError, TypeError) as problem:
            raise ValueError(f"{where} is not a whole costs file: {problem}") from None

    @classmethod
    def load(cls, path: str | Path) -> Costs:
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")), str(path))
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist") from None
        except json.JSONDecodeError as problem:
            raise ValueError(f"{path} is not JSON: {problem}") from None
