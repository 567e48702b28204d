"""Log-probabilities for clients: of each committed token and of the likeliest ones beside it.

They are the model's own, before temperature and truncation, as OpenAI's and vLLM's are by default; so a greedy answer
has some too. Notes are kept by row, not by its key: requests with the same seed have rows with the same key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from draftsmith.infer.contract.distribution import NodeDistribution
from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.protocols import Rule, TargetDistribution, Verdict
from draftsmith.infer.contract.rng import StepRng
from draftsmith.infer.contract.row import Row
from draftsmith.infer.rules.named import as_rule


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of one token, and of the likeliest ones in its place, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class LogprobsRule:
    """A verification rule that notes log-probabilities of the rows that want them."""

    def __init__(self, rule: str | Rule | None = None) -> None:
        self.rule = as_rule(rule)
        self._wanted: dict[Row, int] = {}
        self._noted: dict[Row, dict[int, TokenLogprobs]] = {}

    def __len__(self) -> int:
        """The number of rows that it notes anything of."""
        return len(self._wanted)

    def note(self, row: Row, top: int) -> None:
        """From now on, note the log-probabilities of this row's tokens and of the `top` likeliest."""
        self._wanted[row], self._noted[row] = top, {}

    def __call__(self, draft: Draft, distribution: TargetDistribution, rng: StepRng) -> Verdict:
        verdict = self.rule(draft, distribution, rng)
        assert isinstance(distribution, NodeDistribution)
        top = self._wanted.get(distribution.row)
        if top is not None:
            tokens = [*(draft.tokens[node] for node in verdict.path), verdict.next_token]
            noted = self._noted[distribution.row]
            for depth, (node, token) in enumerate(zip((ROOT, *verdict.path), tokens)):
                noted[rng.position + depth] = _of(distribution.raw_logprobs(node), token, top)
        return verdict

    def take(self, row: Row, start: int, count: int) -> list[TokenLogprobs]:
        """Those of the row's `count` tokens from position `start` on; they are forgotten here."""
        noted = self._noted[row]
        return [noted.pop(start + i) for i in range(count)]

    def forget(self, row: Row) -> None:
        self._wanted.pop(row, None)
        self._noted.pop(row, None)


def _of(logprobs_V: torch.Tensor, token: int, top: int) -> TokenLogprobs:
    if not top:
        return TokenLogprobs(token, float(logprobs_V[token]))
    values, ids = torch.topk(logprobs_V, min(top, logprobs_V.shape[0]))
    return TokenLogprobs(token, float(logprobs_V[token]), tuple(zip(ids.tolist(), values.tolist())))
