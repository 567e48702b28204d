"""Reads the likeliest tokens off a pass's logits, packed so that they come down in the transfer of the argmax.

The k largest are about as dear as the argmax (25 tokens of a vocabulary of 128,256 on one core: 7.2 and 6.9 ms). Their
probabilities would need the sum over the vocabulary, as much again, so their logits are given instead.

Legend: N tokens of a pass, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np
import torch

from draftsmith.infer.contract.row import Row
from draftsmith.infer.contract.top_tokens import TopTokens
from draftsmith.infer.models.runner.transfers import Transfers


def chosen(logits_NV: torch.Tensor) -> torch.Tensor:
    """[N] the argmax, -1 where the largest logit is not finite (both ways propagate NaN)."""
    if logits_NV.device.type == "cpu":  # numpy takes a third of torch's time (16 tokens of a vocabulary of 8,192)
        exact_NV = (logits_NV.float() if logits_NV.element_size() < 4 else logits_NV).numpy()
        choice_N = torch.empty(len(exact_NV), dtype=torch.long)
        np.argmax(exact_NV, -1, out=choice_N.numpy())
        best_N = exact_NV[np.arange(len(exact_NV)), choice_N.numpy()]
        choice_N.numpy()[~np.isfinite(best_N)] = -1
        return choice_N
    best_N, choice_N = logits_NV.max(-1)
    return choice_N.masked_fill(~torch.isfinite(best_N), -1)


def packed_top(logits_NV: torch.Tensor, k: int) -> torch.Tensor:
    """[N, 2K] int64: ids, then their logits as the bits of float64. Ids are -1 where the largest is not finite."""
    best_NK, ids_NK = logits_NV.topk(min(k, logits_NV.shape[-1]), -1)
    ids_NK = ids_NK.masked_fill(~torch.isfinite(best_NK[:, :1]), -1)
    return torch.cat([ids_NK, best_NK.to(torch.float64).view(torch.int64)], 1)


def unpacked(words_NW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids and logits, [N, K] each, of what `packed_top` packed."""
    k = words_NW.shape[1] // 2
    return words_NW[:, :k], np.ascontiguousarray(words_NW[:, k:]).view(np.float64)


def read_step(
    logits_NV: torch.Tensor, transfers: Transfers, choices: bool, places: Sequence[int], k: int
) -> tuple[list[int] | None, np.ndarray | None]:
    """In one transfer: the argmax at all of a pass's logits, if wanted, and what `packed_top` gives at `places`."""
    parts = [chosen(logits_NV)] if choices else []
    if places:
        some_NV = logits_NV if len(places) == len(logits_NV) else logits_NV[list(places)]
        parts.append(packed_top(some_NV, k).flatten())
    if not parts:
        return None, None
    if not places:
        return transfers.down(parts[0]), None
    words = transfers.down_array(torch.cat(parts))
    count = len(logits_NV) if choices else 0
    return (words[:count].tolist() if choices else None), words[count:].reshape(len(places), -1)


class PromptTop:
    """Collects the likeliest tokens of the prompts of rows that `asked`, pass by pass, and hands them over once."""

    def __init__(self, k: int, asked: Container[Row]) -> None:
        self._k = k
        self._asked = asked
        self._found: dict[Row, list[torch.Tensor]] = {}

    def __call__(self, rows: Sequence[Row], counts: Sequence[int], logits_NV: torch.Tensor) -> None:
        """A pass over `counts` tokens of each row gave these logits."""
        for row, own_NV in zip(rows, logits_NV.split([*counts])):
            if row in self._asked:
                self._found.setdefault(row, []).append(packed_top(own_NV, self._k))

    def taken(self, transfers: Transfers, starts: dict[Row, int], parts: dict[Row, list[int]]) -> dict[Row, TopTokens]:
        """By row, whose tokens `parts` were read from position `starts` on."""
        if not self._found:
            return {}
        rows = list(self._found)
        words_NW = transfers.down_array(torch.cat([one for row in rows for one in self._found[row]]))
        ends = np.cumsum([len(parts[row]) for row in rows])
        return {
            row: TopTokens(starts[row], parts[row], list(range(-1, len(parts[row]) - 1)), *unpacked(own_NW))
            for row, own_NW in zip(rows, np.split(words_NW, ends[:-1]))
        }
