"""The target's distribution at the nodes of a draft, computed from logits only at the nodes that a rule visits.

Processors get the row's prefix and the node's path as input, so the distribution at a node is the one that sampling one
token at a time would use.

Legend: N nodes (index 0 is the prefix itself, 1 + n is node n), V vocabulary, T positions.
"""

from __future__ import annotations

import math

import torch

from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.race import first
from draftsmith.infer.contract.row import Row

NAN = "the target's logits are NaN or infinite: check its weights and dtype"
BANNED = "all tokens are banned: check bad_words_ids, suppress_tokens, begin_suppress_tokens and the other bans"


def draw_by_inversion(probs_V: torch.Tensor, uniform: float) -> int:
    """The token at which the cumulative distribution passes `uniform`; a token of probability 0 is never drawn."""
    cumulated_V = torch.cumsum(probs_V, 0, dtype=torch.float64)
    total = float(cumulated_V[-1])
    if not 0 < total < float("inf"):
        raise ValueError(f"no token can be drawn: the probabilities sum to {total}")
    level = uniform * total
    token = int(torch.searchsorted(cumulated_V, level, right=True))
    if token >= probs_V.numel():
        token = int(torch.nonzero(probs_V)[-1])
    return token


class NodeDistribution:
    """One row's distributions from logits_NV.

    `choices_N`: every node's argmax, if computed for the batch, or -1 where the largest logit is not finite.
    """

    def __init__(self, logits_NV: torch.Tensor, row: Row, draft: Draft, choices_N: list[int] | None) -> None:
        self.greedy = row.settings.greedy
        self.vocab_size = logits_NV.shape[-1]
        self._logits_NV = logits_NV
        self._row = row
        self._draft = draft
        self._eos = sorted(row.stops.ids)
        if row.processors is None:
            self._processors = row.settings.processors(self._eos, row.prompt_tokens, logits_NV.device)
            self._warpers = row.settings.warpers()
        else:
            self._processors, self._warpers = list(row.processors), []
        self._choices_N = None if self._processors else choices_N
        self._probs: dict[int, torch.Tensor] = {}

    @property
    def row(self) -> Row:
        return self._row

    def choice(self, node: int) -> int:
        """The greedy token at `node`."""
        if self._choices_N is not None and self._choices_N[node + 1] >= 0:
            return self._choices_N[node + 1]
        return int(self._processed(node).argmax())

    def probs(self, node: int) -> torch.Tensor:
        """[V] the target's probabilities at `node`, float64."""
        known = self._probs.get(node)
        if known is None:
            if self.greedy:
                known = torch.zeros(self.vocab_size, dtype=torch.float64, device=self._logits_NV.device)
                known[self.choice(node)] = 1.0
            else:
                logits_V = self._processed(node)
                known = torch.softmax(logits_V.to(torch.float64), -1)
            self._probs[node] = known
        return known

    def draw(self, node: int) -> int:
        """The target's own token after `node`: its argmax, or the winner of the position's race."""
        if self.greedy:
            return self.choice(node)
        position = len(self._row.ids) + len(self._path(node))
        return first(self._processed(node), self._row.settings.seed, self._row.key, position)

    def logits(self, node: int) -> torch.Tensor:
        """[V] the logits at `node` after processors, temperature and truncation."""
        return self._processed(node)

    def raw_logprobs(self, node: int) -> torch.Tensor:
        """[V] the model's own log-probabilities at `node`: before processors, temperature and truncation."""
        return torch.log_softmax(self._logits_NV[node + 1].to(torch.float64), -1)

    def _processed(self, node: int) -> torch.Tensor:
        logits_V = self._logits_NV[node + 1]
        if logits_V.dtype != torch.float64:
            logits_V = logits_V.to(torch.float32, copy=True)
        scores_1V = logits_V[None]
        self._check(scores_1V, node)
        if self._processors:
            prefix_1T = torch.tensor([self._row.ids + self._path(node)], device=logits_V.device)
            for processor in self._processors:
                scores_1V = processor(prefix_1T, scores_1V)
            self._check(scores_1V, node)
        for warper in self._warpers:
            scores_1V = warper(None, scores_1V)
        return scores_1V[0]

    def _check(self, scores_1V: torch.Tensor, node: int) -> None:
        """ValueError unless some token can be chosen. `max` propagates NaN."""
        highest = float(scores_1V.max())
        if not math.isfinite(highest):
            position = len(self._row.ids) + len(self._path(node))
            raise ValueError(f"row {self._row.key}, position {position}: {BANNED if highest < 0 else NAN}")

    def _path(self, node: int) -> list[int]:
        path: list[int] = []
        while node != ROOT:
            path.append(self._draft.tokens[node])
            node = self._draft.parents[node]
        return path[::-1]
