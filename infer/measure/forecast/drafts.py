"""The log-probabilities that a draft model gives the tokens of a text.

The model is run by the drafter's own reader, and its distribution is the one that a drawn draft comes from: after the
row's temperature and truncation. Of a draft that reads text, one pass over the text gives them all, at each exit. Those
of a head depend on where the step began as well, because it reads its own states from there on: it makes one more pass
for each depth.

Legend: T tokens of the answer, K depths, N tokens of a pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """A drafter with a model whose distribution at a token depends on the text alone. `exit_sources`: as of
    LeavesEarly."""

    exit_sources: Mapping[int, str]
    reader: DraftReader
    max_positions: int

    @property
    def drawn_chain(self) -> int: ...

    def bind(self, target: Target) -> None: ...


def check_draws(label: str, drafter: Any) -> DrawsChains:
    """The drafter as one whose chains can be forecast; ValueError for a retrieval drafter, and for heads that have a
    distribution for each depth."""
    if isinstance(drafter, DrawsChains) and not isinstance(drafter.reader, ReadsAlong | ReadsAhead):
        raise ValueError(f"{label} has a head for each depth, which no forecast knows: `draftsmith bench` measures it")
    if not isinstance(drafter, DrawsChains) or not isinstance(drafter.reader, ReadsAlong | ReadsAhead):
        raise ValueError(f"{label} draws nothing from a model of its own: `draftsmith replay` is exact for it")
    return drafter


def drawn_chains(drafters: Mapping[str, Any]) -> dict[str, DrawsChains]:
    """Those of `drafters` that draw chains for rows with a temperature."""
    chains = {label: one for label, one in drafters.items() if isinstance(one, DrawsChains) and one.drawn_chain}
    return {label: one for label, one in chains.items() if isinstance(one.reader, ReadsAlong | ReadsAhead)}


def bind_draft(drafter: DrawsChains, target: Target | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Bind a draft to its target; without one, check that the texts' `tokenizer` is the draft's, and assume that the
    target draws nothing beyond its tokenizer, where a draft's vocabulary may be padded otherwise."""
    if target is None:
        known = drafter.reader.draft_vocab_size
        known = known if tokenizer is None else min(len(tokenizer), known)
        target = RecordedTarget({}, known, tokenizer)
    drafter.bind(target)


def logprobs_ahead(
    drafter: DrawsChains, prompt: Sequence[int], answer: Sequence[int], settings: Settings, depth: int
) -> dict[str, np.ndarray]:
    """[T, K] by source: log(draft_probs) of the `depth` answer tokens from each on, in a step that starts there; -inf
    where the draft cannot draw it, and beyond the draft's context."""
    if isinstance(drafter.reader, ReadsAlong):
        found = draft_logprobs(drafter, prompt, answer, settings)
        return {source: ahead(logs_T, depth) for source, logs_T in found.items()}
    assert isinstance(drafter.reader, ReadsAhead), "checked by check_draws"
    (source,) = drafter.exit_sources.values()
    return {source: _unrolled(drafter.reader, [*prompt, *answer], len(prompt), settings, depth)}


@torch.inference_mode()
def _unrolled(reader: ReadsAhead, ids: Sequence[int], first: int, settings: Settings, depth: int) -> np.ndarray:
    logs_TK = np.full((len(ids) - first, depth), -np.inf)
    at = first - 1  # the position that predicts the answer's first token
    for steps in reader.ahead(ids, first - 1, depth):
        for k, logits_NV in enumerate(steps):
            following = ids[at + k + 1 : at + k + 1 + len(logits_NV)]
            if following:
                following_N = torch.tensor(following, device=logits_NV.device)
                chosen_N = _chosen(logits_NV[: len(following)], following_N, settings)
                logs_TK[at + 1 - first : at + 1 - first + len(following), k] = chosen_N
        at += len(steps[0])
    return logs_TK


@torch.inference_mode()
def draft_logprobs(
    drafter: DrawsChains, prompt: Sequence[int], answer: Sequence[int], settings: Settings
) -> dict[str, np.ndarray]:
    """[T] by source: log(draft_probs) of every answer token; -inf where the draft cannot draw it, and beyond the
    draft's context."""
    assert isinstance(drafter.reader, ReadsAlong), "checked by check_draws"
    ids, first = [*prompt, *answer], len(prompt) - 1
    found: dict[str, list[np.ndarray]] = {source: [np.zeros(0)] for source in drafter.exit_sources.values()}
    at = first + 1
    for logits in drafter.reader.along(ids, first):
        following_N = torch.tensor(ids[at : at + len(logits[0])], device=logits[0].device)
        for source, logits_NV in zip(found, logits, strict=True):
            found[source].append(_chosen(logits_NV, following_N, settings))
        at += len(following_N)
    beyond = np.full(len(ids) - at, -np.inf)
    return {source: np.concatenate([*parts, beyond]) for source, parts in found.items()}


def _chosen(logits_NV: torch.Tensor, following_N: torch.Tensor, settings: Settings) -> np.ndarray:
    scores_NV = logits_NV.float()
    for warper in settings.warpers():
        scores_NV = warper(None, scores_NV)
    logs_NV = torch.log_softmax(scores_NV.double(), -1)
    inside_N = following_N < logs_NV.shape[-1]
    logs_N = logs_NV.gather(1, torch.where(inside_N, following_N, 0)[:, None])[:, 0]
    found: np.ndarray = torch.where(inside_N, logs_N, -torch.inf).cpu().numpy()
    return found
