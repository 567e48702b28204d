"""The log-probabilities that a draft model gives the tokens of a text, and their ranks, at each of its exits, in one
pass over the text.

The model runs in the drafter's own runner, and its distribution is the one that a drawn draft comes from: after the
row's temperature and truncation. Ranks are those of its logits, from which trees of likeliest tokens are made.

Legend: T tokens of the answer, N tokens of a pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch

from draftsmith.infer.contract.protocols import Target
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.models.recorded_target import RecordedTarget
from draftsmith.infer.models.runner.entries import Entries
from draftsmith.infer.models.runner.model_runner import ModelRunner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens of a pass: bounds the memory of the logits.
CHUNK = 128


@runtime_checkable
class DrawsChains(Protocol):
    """A drafter with a model whose distribution at a token depends on the text alone. `exit_sources`: as of
    LeavesEarly."""

    exit_sources: Mapping[int, str]
    model: Any
    tokenizer: PreTrainedTokenizerBase | None
    draft_vocab_size: int
    vocab_size: int
    max_positions: int

    @property
    def drawn_chain(self) -> int: ...

    @property
    def lm(self) -> ModelRunner: ...

    def bind(self, target: Target) -> None: ...


def check_draws(label: str, drafter: Any) -> DrawsChains:
    """The drafter as one whose chains can be forecast; ValueError for a retrieval drafter."""
    if not isinstance(drafter, DrawsChains):
        raise ValueError(f"{label} draws nothing from a model of its own: `draftsmith replay` is exact for it")
    return drafter


def drawn_chains(drafters: Mapping[str, Any]) -> dict[str, DrawsChains]:
    """Those of `drafters` that draw chains for rows with a temperature."""
    return {label: one for label, one in drafters.items() if isinstance(one, DrawsChains) and one.drawn_chain}


def bind_draft(drafter: DrawsChains, target: Target | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Bind a draft to its target; without one, check that the texts' `tokenizer` is the draft's, and assume that the
    target draws nothing beyond its tokenizer, where a draft's vocabulary may be padded otherwise."""
    if target is None:
        known = drafter.draft_vocab_size if tokenizer is None else min(len(tokenizer), drafter.draft_vocab_size)
        target = RecordedTarget({}, known, tokenizer)
    drafter.bind(target)


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Of every answer token: log(draft_probs), -inf where the draft cannot draw it and beyond the draft's context; and
    its rank among the draft's likeliest tokens, from 0, a number beyond those asked for where it is not one of them.

    For greedy rows, whose drafts are the likeliest tokens, log(draft_probs) is 0 or -inf."""

    logprobs_T: np.ndarray
    ranks_T: np.ndarray


@torch.inference_mode()
def draft_scores(
    drafter: DrawsChains, prompt: Sequence[int], answer: Sequence[int], settings: Settings, ranks: int = 1
) -> dict[str, TokenScores]:
    """By source. `ranks`: how many of the draft's likeliest tokens to look for a token among."""
    lm, row = drafter.lm, object()
    ids = [*prompt, *answer]
    first, last = len(prompt) - 1, min(len(ids), drafter.max_positions) - 1
    found: dict[str, list[TokenScores]] = {source: [] for source in drafter.exit_sources.values()}
    lm.open(row, len(ids))
    try:
        lm.prefill([row], [ids[: min(first, last)]], blocks=max(len(lm.exits), 1))
        for start in range(first, last, CHUNK):
            end = min(start + CHUNK, last)
            logits = _logits(lm, row, ids[start:end])
            following_N = torch.tensor(ids[start + 1 : end + 1], device=lm.device)
            for source, logits_NV in zip(found, logits, strict=True):
                found[source].append(_chosen(logits_NV[:, : drafter.vocab_size], following_N, settings, ranks))
    finally:
        lm.close(row)
    left = len(answer) - max(last - first, 0)
    beyond = TokenScores(np.full(left, -np.inf), np.full(left, ranks))
    return {
        source: TokenScores(
            np.concatenate([part.logprobs_T for part in (*parts, beyond)]),
            np.concatenate([part.ranks_T for part in (*parts, beyond)]),
        )
        for source, parts in found.items()
    }


def _logits(lm: ModelRunner, row: object, tokens: list[int]) -> list[torch.Tensor]:
    """[N, V] of each exit for tokens behind the row's, which are committed."""
    chain, every = [Entries.chain(tokens)], [list(range(len(tokens)))]
    if lm.exits:
        states = lm.enter([row], chain)
        logits = [lm.logits(states[0])]
        for block in range(1, len(lm.exits)):
            logits.append(lm.logits(lm.deepen([row], block, every)[0]))
    else:
        logits = [lm.forward([row], chain, eagerly=True).logits_NV]
    lm.commit([row], every)
    return logits


def _chosen(logits_NV: torch.Tensor, following_N: torch.Tensor, settings: Settings, ranks: int) -> TokenScores:
    scores_NV = logits_NV.float()
    top_NK = torch.topk(scores_NV, min(ranks, scores_NV.shape[-1]), dim=-1).indices
    is_NK = top_NK == following_N[:, None]
    ranks_N = torch.where(is_NK.any(-1), is_NK.int().argmax(-1), ranks)
    if settings.greedy:
        logs_N = torch.where(ranks_N == 0, 0.0, -torch.inf).double()
        return TokenScores(logs_N.cpu().numpy(), ranks_N.cpu().numpy())
    for warper in settings.warpers():
        scores_NV = warper(None, scores_NV)
    logs_NV = torch.log_softmax(scores_NV.double(), -1)
    inside_N = following_N < logs_NV.shape[-1]
    logs_N = logs_NV.gather(1, torch.where(inside_N, following_N, 0)[:, None])[:, 0]
    return TokenScores(torch.where(inside_N, logs_N, -torch.inf).cpu().numpy(), ranks_N.cpu().numpy())
