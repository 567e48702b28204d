"""A target that replays recorded answers, so that replay is the same loop as decoding.

A draft token is accepted if it equals the recorded one. For a recording sampled at a temperature this is exact only for
outright drafts (the draw was made first and is looked up). Sampled drafts need the distribution itself, so they are
refused unless the recording is greedy; drawn chains are forecast (infer/measure/forecast).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.protocols import DraftShape, Feedback, PassTimer, Verdict
from draftsmith.infer.contract.row import Row
from draftsmith.infer.contract.top_tokens import top_asked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class RecordedDistribution:
    """A point mass on the recorded token at the nodes that follow the recording; a walk visits no others."""

    ahead: Sequence[int]
    draft: Draft
    vocab_size: int
    greedy: bool = True

    def choice(self, node: int) -> int:
        return self.ahead[0 if node == ROOT else self.draft.depths[node]]

    def probs(self, node: int) -> torch.Tensor:
        probs_V = torch.zeros(self.vocab_size, dtype=torch.float64)
        probs_V[self.choice(node)] = 1.0
        return probs_V

    def draw(self, node: int) -> int:
        return self.choice(node)


@dataclass(slots=True)
class RecordedScores:
    distributions: list[RecordedDistribution]

    def distribution(self, index: int) -> RecordedDistribution:
        return self.distributions[index]


class RecordedTarget:
    """`answers`: row key -> recorded token ids. A row must stop where its recording ends (max_new_tokens)."""

    draft_shape: DraftShape = "tree"
    buckets: tuple[int, ...] = ()
    max_positions = 1 << 30
    forward_seconds = 0.0
    bytes_moved = 0
    model = None

    def __init__(
        self,
        answers: Mapping[str, Sequence[int]],
        vocab_size: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        sampled: bool = False,
    ) -> None:
        self.answers = answers
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self.sampled = sampled
        self._read: dict[Row, int] = {}

    def admit(self, rows: Sequence[Row], features: Sequence[str] = ()) -> None:
        if top_asked(features):
            raise ValueError(
                "recorded answers hold no likeliest tokens, which this drafter reads at every node: decode with the "
                "target's model (draftsmith bench)"
            )
        if features:
            raise ValueError(f"recorded answers have no model states; this drafter reads {', '.join(features)}")
        for row in rows:
            if row.key not in self.answers:
                raise ValueError(f"no recorded answer for {row.key}")
        self._read |= dict.fromkeys(rows, 0)

    def unread(self, row: Row) -> int:
        return len(row.ids) - 1 - self._read[row]

    def unread_alone(self, row: Row) -> int:
        return self.unread(row)

    def prefill(self, rows: Sequence[Row], limit: int) -> list[Feedback]:
        return [self._enter(row, min(limit, self.unread(row))) for row in rows]

    def abandon(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._read[row] = min(self._read[row], len(row.ids) - 1)

    def release(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._read.pop(row, None)

    def score(self, rows: Sequence[Row], drafts: Sequence[Draft]) -> RecordedScores:
        if self.sampled and any(not t.group.outright for draft in drafts for ts in draft.trials.values() for t in ts):
            raise ValueError(
                "answers sampled at a temperature can be replayed with outright drafts only: add [sample=likeliest] to "
                "drafters that draw, as in small:MODEL[sample=likeliest]; drawn chains (top_k=1) of a draft with one "
                "exit are forecast from answers with log-probabilities"
            )
        aheads = [self.answers[row.key][len(row.new_ids) :] for row in rows]
        return RecordedScores([RecordedDistribution(a, d, self.vocab_size) for a, d in zip(aheads, drafts)])

    def commit(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> list[Feedback]:
        pending = [len(row.ids) - self._read[row] for row in rows]
        return [self._enter(row, p + len(verdict.kept_path)) for row, p, verdict in zip(rows, pending, verdicts)]

    def _enter(self, row: Row, count: int) -> Feedback:
        start = self._read[row]
        self._read[row] += count
        return Feedback(start, count)

    def fingerprint(self) -> str:
        raise ValueError("recorded answers do not name their target: this needs the target's model")

    def pass_timers(self) -> dict[str, PassTimer]:
        return {}
