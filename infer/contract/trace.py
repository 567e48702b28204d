"""The trace of a step: every metric, table and plot is derived from these rows and from nothing else.

Seconds are those of the whole step, shared by its `batch` rows; `step` numbers the target's forward passes, so that the
rows of one step can be found together.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple


class Tried(NamedTuple):
    """A trial that the verifier reached: its depth (1 = right below the prefix), and whether it was accepted."""

    depth: int
    source: str
    confidence: float
    accepted: bool


@dataclass(slots=True)
class StepTrace:
    """One row in one step. `accepted` counts draft tokens kept; `committed` the target's own token as well.

    `also_named`: how many accepted tokens each source named where another one is credited. `bytes_moved`: the weights
    that the step's passes read, for comparison with memory bandwidth. `jointly`: as of a Verdict; then `tried` says how
    far drafts of this shape came, and nothing about other shapes. `read`: how many tokens of the row's prompt the pass
    read before the newest one; the seconds that took belong to `prefill_s`.
    """

    row: str
    step: int
    batch: int
    context: int
    nodes: int
    trials: int
    depth: int
    accepted: int
    committed: int
    tried: list[Tried] = field(default_factory=list)
    nodes_by_source: dict[str, int] = field(default_factory=dict)
    exits: list[tuple[int, int]] = field(default_factory=list)
    committed_sources: list[str] = field(default_factory=list)
    also_named: dict[str, int] = field(default_factory=dict)
    propose_s: float = 0.0
    score_s: float = 0.0
    verify_s: float = 0.0
    commit_s: float = 0.0
    target_forward_s: float = 0.0
    draft_forward_s: float = 0.0
    bytes_moved: int = 0
    jointly: bool = False
    read: int = 0

    @property
    def seconds(self) -> float:
        return self.propose_s + self.score_s + self.verify_s + self.commit_s

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> StepTrace:
        row = dict(row)
        row["tried"] = [Tried(*tried) for tried in row.get("tried", [])]
        row["exits"] = [(int(depth), int(layer)) for depth, layer in row.get("exits", [])]
        return cls(**row)


@dataclass(slots=True)
class Generation:
    """The result of one row: new token ids (stop token included), why it stopped, and its times.

    `stop` is "error" for a row that ended with an error, which `error` tells, and "aborted" for one that was aborted.
    `first_s` is the time from the row's admission to its first token (TTFT); `prefill_s` its share of the time that
    reading its prompt with target and drafter took, which no step includes.
    """

    row: str
    token_ids: list[int]
    stop: str
    prompt_tokens: int
    text: str = ""
    traces: list[StepTrace] = field(default_factory=list)
    first_s: float = 0.0
    prefill_s: float = 0.0
    seconds: float = 0.0
    error: str = ""
