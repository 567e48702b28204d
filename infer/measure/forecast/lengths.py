"""The accepted_length of drawn chains, exactly, from two log-probabilities per token.

For a text drawn from the target, let ratio_i = draft_probs(token_i) / target_probs(token_i), both after temperature and
truncation. Given the text, a step that drafts from its token 1 on accepts at least i tokens with probability

    token:  prod over j <= i of min(1, ratio_j)
    block:  min(1, min over j <= i of prod over l <= j of ratio_l)        (arXiv 2403.10444)

The committed text is the given one whatever was drafted, so the numbers of steps of all suffixes follow from the end of
the text backwards, each as long as the engine would draft there: nothing in the first step, whose pass reads the end of
the prompt, which a draft model has not read before it. Neither a mean over positions nor a geometric series
gives this: steps do not start at all positions alike, and acceptance at neighbouring positions is correlated.

Legend: T tokens of a text, K depths, L chain lengths, D depths at which a chain may end, F figures that are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

RuleName = Literal["token", "block"]
RULES: tuple[RuleName, ...] = get_args(RuleName)


@dataclass(frozen=True, slots=True)
class ExpectedSteps:
    """Of one text, for each chain length: the expected steps, and over all steps the sums of the drafted tokens and of
    the tokens before the draft, the prompt's included."""

    tokens: int
    steps_L: np.ndarray
    nodes_L: np.ndarray
    context_L: np.ndarray


def ahead(logs_T: np.ndarray, depth: int) -> np.ndarray:
    """[T, K] of each token and the `depth` - 1 that follow it; 0 beyond the end of the text."""
    padded = np.concatenate([logs_T, np.zeros(depth)])
    return np.lib.stride_tricks.sliding_window_view(padded[: len(logs_T) + depth - 1], depth)


def survival(log_ratios: np.ndarray, depth: int, rule: RuleName) -> np.ndarray:
    """[T, K + 1] of a step that starts at each token: the probability that at least 0, 1, ... `depth` draft tokens are
    accepted, if that many are drafted. What lies beyond the end of the text means nothing.

    `log_ratios`: [T], or [T, K] if a token's depends on where the step starts."""
    ahead_TK = ahead(log_ratios, depth) if log_ratios.ndim == 1 else log_ratios[:, :depth]
    if rule == "token":
        logs_TK = np.cumsum(np.minimum(ahead_TK, 0.0), axis=1)
    else:
        logs_TK = np.minimum(np.minimum.accumulate(np.cumsum(ahead_TK, axis=1), axis=1), 0.0)
    return np.concatenate([np.ones((len(ahead_TK), 1)), np.exp(logs_TK)], axis=1)


def expected_steps(
    log_ratios: np.ndarray,
    lengths: Sequence[int],
    rule: RuleName,
    *,
    prompt_tokens: int,
    max_new_tokens: int,
    max_positions: int,
) -> ExpectedSteps:
    """How a text would be decoded with chains of each of `lengths`. `log_ratios`: as of `survival`.

    `max_new_tokens`: the limit that the engine would decode with; a draft is never deeper than what is left less one.
    `max_positions`: the draft model's context.
    """
    count, most = len(log_ratios), max(lengths)
    reach_TK = survival(log_ratios, most, rule)
    at_T = np.arange(count)
    room_T = np.minimum(max_new_tokens - at_T - 1, max_positions - prompt_tokens - at_T)
    room_T[:1] = 0  # the first step
    depth_LT = np.clip(np.minimum(np.asarray(lengths)[:, None], room_T), 0, None)
    within_DK = np.tri(most + 1, dtype=bool)
    # The sums of every suffix: suffixes that begin behind the end of the text have no steps.
    sums_FLT = np.zeros((3, len(lengths), count + most + 1))
    for t in range(count - 1, -1, -1):
        depth_L = depth_LT[:, t]
        reach_LK = np.where(within_DK[depth_L], reach_TK[t], 0.0)
        accepted_LK = reach_LK - np.concatenate([reach_LK[:, 1:], np.zeros((len(lengths), 1))], axis=1)
        sums_FLT[:, :, t] = (accepted_LK * sums_FLT[:, :, t + 1 : t + most + 2]).sum(-1)
        sums_FLT[0, :, t] += 1
        sums_FLT[1, :, t] += depth_L
        sums_FLT[2, :, t] += prompt_tokens + t
    return ExpectedSteps(count, *sums_FLT[:, :, 0])
