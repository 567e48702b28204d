"""The log-probabilities that a draft model gives the tokens of a text, and their ranks.

The model is run by the drafter's own reader, and its distribution is the one that a drawn draft comes from: after the
row's temperature and truncation. Of a draft that reads text, one pass over the text gives them all, at each exit. Those
of a head depend on where the step began as well, because from there on it reads no states of the target: it makes one
more pass for each depth. Ranks are those of its logits, from which trees of likeliest tokens are made.

Legend: T tokens of the answer, K depths, N tokens of a pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch

from draftsmith.infer.contract.protocols import Target
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.drafters.draft_reader import DraftReader, ReadsAhead, ReadsAlong
from draftsmith.infer.measure.forecast.lengths import ahead
from draftsmith.infer.models.recorded_target import RecordedTarget

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@runtime_checkable
class DrawsChains(Protocol):
    """A drafter with a model whose distribution at a token depends on the text, and on where the step began.
    `exit_sources`: as of LeavesEarly."""

    exit_sources: Mapping[int, str]
    reader: DraftReader
    max_positions: int

    @property
    def drawn_chain(self) -> int: ...

    def bind(self, target: Target) -> None: ...


def check_draws(label: str, drafter: Any) -> DrawsChains:
    """The drafter as one whose chains can be forecast; ValueError for a retrieval drafter."""
    if not isinstance(drafter, DrawsChains) or not isinstance(drafter.reader, ReadsAlong | ReadsAhead):
        raise ValueError(f"{label} draws nothing from a model of its own: `draftsmith replay` is exact for it")
    return drafter


def check_target(label: str, drafter: DrawsChains) -> None:
    """ValueError if a forecast of this drafter needs the target."""
    if not isinstance(drafter.reader, ReadsAlong):
        raise ValueError(f"{label} reads the target's states, which no text holds: give --target")


def drawn_chains(drafters: Mapping[str, Any]) -> dict[str, DrawsChains]:
    """Those of `drafters` that draw chains for rows with a temperature."""
    return {label: one for label, one in drafters.items() if isinstance(one, DrawsChains) and one.drawn_chain}


def bind_draft(drafter: DrawsChains, target: Target | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Bind a draft to its target; without one, check that the texts' `tokenizer` is the draft's, and assume that the
    target draws nothing beyond its tokenizer, where a draft's vocabulary may be padded otherwise."""
    if target is None:
        known = drafter.reader.draft_vocab_size
        known = known if tokenizer is None else min(len(tokenizer), known)
        target = RecordedTarget({}, known, tokenizer)
    drafter.bind(target)


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Of the K tokens from each of an answer on, in a step that starts there: log(draft_probs), -inf where the draft
    cannot draw it and beyond the draft's context; and its rank among the draft's likeliest tokens, from 0, a number
    beyond those asked for where it is not one of them. What lies beyond the end of the text means nothing.

    For greedy rows, whose drafts are the likeliest tokens, log(draft_probs) is 0 or -inf."""

    logprobs_TK: np.ndarray
    ranks_TK: np.ndarray


def draft_scores(
    drafter: DrawsChains,
    prompt: Sequence[int],
    answer: Sequence[int],
    settings: Settings,
    depth: int = 1,
    ranks: int = 1,
) -> dict[str, TokenScores]:
    """By source, to `depth` tokens ahead. `ranks`: how many of the draft's likeliest tokens to look for a token in."""
    reader, ids, first = drafter.reader, [*prompt, *answer], len(prompt)
    if isinstance(reader, ReadsAlong):
        along = _along(reader, list(drafter.exit_sources.values()), ids, first, settings, ranks)
        return {source: TokenScores(*(ahead(one_T, depth) for one_T in both)) for source, both in along.items()}
    assert isinstance(reader, ReadsAhead), "checked by check_draws"
    (source,) = drafter.exit_sources.values()
    return {source: _unrolled(reader, ids, first, settings, depth, ranks)}


@torch.inference_mode()
def _along(
    reader: ReadsAlong, sources: Sequence[str], ids: Sequence[int], first: int, settings: Settings, ranks: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """[T] log-probabilities and [T] ranks by source."""
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {source: [] for source in sources}
    at = first
    for logits in reader.along(ids, first - 1):
        following_N = torch.tensor(ids[at : at + len(logits[0])], device=logits[0].device)
        for source, logits_NV in zip(sources, logits, strict=True):
            found[source].append(_chosen(logits_NV, following_N, settings, ranks))
        at += len(following_N)
    beyond = (np.full(len(ids) - at, -np.inf), np.full(len(ids) - at, ranks))
    joined = {source: list(zip(*parts, beyond)) for source, parts in found.items()}
    return {source: (np.concatenate(logs), np.concatenate(places)) for source, (logs, places) in joined.items()}


@torch.inference_mode()
def _unrolled(
    reader: ReadsAhead, ids: Sequence[int], first: int, settings: Settings, depth: int, ranks: int
) -> TokenScores:
    logs_TK = np.full((len(ids) - first, depth), -np.inf)
    ranks_TK = np.full((len(ids) - first, depth), ranks)
    at = first - 1  # the position that predicts the answer's first token
    for steps in reader.ahead(ids, first - 1, depth):
        for k, logits_NV in enumerate(steps):
            following = ids[at + k + 1 : at + k + 1 + len(logits_NV)]
            if following:
                following_N = torch.tensor(following, device=logits_NV.device)
                here = slice(at + 1 - first, at + 1 - first + len(following))
                logs_TK[here, k], ranks_TK[here, k] = _chosen(logits_NV[: len(following)], following_N, settings, ranks)
        at += len(steps[0])
    return TokenScores(logs_TK, ranks_TK)


def _chosen(
    logits_NV: torch.Tensor, following_N: torch.Tensor, settings: Settings, ranks: int
) -> tuple[np.ndarray, np.ndarray]:
    """[N] log-probabilities and [N] ranks."""
    scores_NV = logits_NV.float()
    top_NK = torch.topk(scores_NV, min(ranks, scores_NV.shape[-1]), dim=-1).indices
    is_NK = top_NK == following_N[:, None]
    ranks_N = torch.where(is_NK.any(-1), is_NK.int().argmax(-1), ranks)
    if settings.greedy:
        logs_N = torch.where(ranks_N == 0, 0.0, -torch.inf).double()
        return logs_N.cpu().numpy(), ranks_N.cpu().numpy()
    for warper in settings.warpers():
        scores_NV = warper(None, scores_NV)
    logs_NV = torch.log_softmax(scores_NV.double(), -1)
    inside_N = following_N < logs_NV.shape[-1]
    logs_N = logs_NV.gather(1, torch.where(inside_N, following_N, 0)[:, None])[:, 0]
    return torch.where(inside_N, logs_N, -torch.inf).cpu().numpy(), ranks_N.cpu().numpy()
