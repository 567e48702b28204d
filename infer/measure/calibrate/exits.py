"""What every exit of a draft model says at each position of the target's answers, read in one pass over each answer.

A draft's tree is judged along the target's own text only, and there what the draft says does not depend on how it is
run: so one pass over prompt and answer tells all that drafting would have met. A candidate counts as accepted where it
is the answer's next token. That holds for sampled answers as for greedy ones: for outright candidates the target's draw
is made first and then looked up among them, so the probability of acceptance is that of being the token drawn.

Only confidences are read, before any draw and at temperature 1, as drafters state them. Curves are not known here.

Legend: N positions that an answer's token was drawn at, K candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from draftsmith.infer.costs.calibration import TOP
from draftsmith.infer.measure.calibrate.answers import Answered
from draftsmith.infer.measure.calibrate.reliability import Observations
from draftsmith.infer.models.architectures import max_positions
from draftsmith.infer.models.layers import check_parts, find_parts, state_of


@dataclass(frozen=True, slots=True)
class ExitProbabilities:
    """One exit over all answers: per position the prompt, the top probabilities, and the rank of the answer's token
    among them (K where it is none of them)."""

    prompt_N: np.ndarray
    probs_NK: np.ndarray
    rank_N: np.ndarray

    def observations(self) -> Observations:
        """Every candidate at every position."""
        count, width = self.probs_NK.shape
        ranks_NK = np.tile(np.arange(width), (count, 1))
        return Observations(
            np.repeat(self.prompt_N, width),
            ranks_NK.ravel(),
            self.probs_NK.ravel(),
            (ranks_NK == self.rank_N[:, None]).ravel(),
        )

    def covers(self, top: int) -> np.ndarray:
        """[N] whether the answer's token is among the `top` likeliest."""
        found_N: np.ndarray = self.rank_N < top
        return found_N


@torch.inference_mode()
def read_exits(
    model: Any,
    exits: Sequence[int],
    answers: Sequence[Answered],
    vocab_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, ExitProbabilities]:
    """A reading per exit. `vocab_size`: the ids that draft and target share. What is beyond the model's context is left
    out."""
    config = model.config.get_text_config()
    room, depth = max_positions(config), int(config.num_hidden_layers)
    early = [exit for exit in exits if exit != depth]
    found: dict[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {exit: [] for exit in exits}
    with _states_after(model, early) as (parts, states):
        for number, one in enumerate(answers, start=1):
            ids = torch.tensor([*one.prompt, *one.answer][: room + 1], device=model.device)
            if len(ids) > len(one.prompt):
                where_N = torch.arange(len(one.prompt) - 1, len(ids) - 1, device=model.device)
                last = model(input_ids=ids[None, :-1], use_cache=False, logits_to_keep=where_N).logits[0]
                for exit in exits:
                    logits_NV = last if exit == depth else parts.logits(states[exit][0, where_N])
                    probs_NK, rank_N = _ranked(logits_NV[:, :vocab_size].float(), ids[where_N + 1])
                    found[exit].append((np.full(len(rank_N), one.number), probs_NK, rank_N))
            if progress is not None:
                progress(number, len(answers))
    if not all(found.values()):
        raise ValueError(f"every prompt is longer than the draft model's context of {room} tokens")
    return {exit: ExitProbabilities(*(np.concatenate(each) for each in zip(*some))) for exit, some in found.items()}


@contextmanager
def _states_after(model: Any, early: Sequence[int]) -> Iterator[tuple[Any, dict[int, torch.Tensor]]]:
    """The model's parts, and the states [1, T, D] after each of the layers `early` once a pass has run."""
    states: dict[int, torch.Tensor] = {}
    if not early:
        yield None, states
        return
    parts = find_parts(model)
    check_parts(model, parts)

    def keeper(exit: int) -> Any:
        def keep(module: Any, given: Any, output: Any) -> None:
            states[exit] = state_of(output)

        return keep

    hooks = [parts.layers[exit - 1].register_forward_hook(keeper(exit)) for exit in early]
    try:
        yield parts, states
    finally:
        for hook in hooks:
            hook.remove()


def _ranked(logits_NV: torch.Tensor, next_N: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """([N, K] the top probabilities, [N] the rank of the token that came next, K where it is none of them)."""
    top = torch.topk(logits_NV, min(max(TOP), logits_NV.shape[-1]), dim=-1)
    probs_NK = (top.values - torch.logsumexp(logits_NV, -1, keepdim=True)).exp()
    hit_NK = top.indices == next_N[:, None]
    rank_N = torch.where(hit_NK.any(-1), hit_NK.int().argmax(-1), hit_NK.shape[-1])
    return probs_NK.double().cpu().numpy(), rank_N.cpu().numpy()
