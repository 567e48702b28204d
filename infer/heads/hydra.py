"""Hydra heads (arXiv 2402.05109): Medusa's, but each reads the tokens of its path as well.

Head i reads the target's last state, the embedding of the row's newest token and those of the i drafted tokens above
the one it predicts, side by side. Hydra++ has a prefix layer: the states first pass one decoder layer of their own,
with keys and values of accepted positions only.

Legend: N places, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class HydraBlock(nn.Module):
    """A z + SiLU(B z); the blocks after a head's first one, which keep the width, have z itself for A z."""

    def __init__(self, wide: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(wide, width)
        self.res_connection = nn.Linear(wide, width) if wide != width else nn.Identity()

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.res_connection(given) + nn.functional.silu(self.linear(given))
        return out


class HydraHead(nn.Module):
    """Head `number`, counted from 0."""

    def __init__(self, number: int, width: int, vocab_size: int, num_layers: int) -> None:
        super().__init__()
        later = [HydraBlock(width, width) for _ in range(num_layers - 1)]
        self.blocks = nn.ModuleList([HydraBlock((number + 2) * width, width), *later])
        self.lm_head = nn.Linear(width, vocab_size, bias=True)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            given = block(given)
        out: torch.Tensor = self.lm_head(given)
        return out


class HydraHeads(nn.Module):
    """The heads of one target, whose states and embeddings are `width` wide."""

    features = ("last",)

    def __init__(self, width: int, vocab_size: int, num_heads: int, num_layers: int = 1) -> None:
        super().__init__()
        if min(width, vocab_size, num_heads, num_layers) < 1:
            raise ValueError("Hydra heads need a width, a vocabulary, heads and layers of at least 1")
        self.width = width
        self.vocab_size = vocab_size
        self.num_layers = num_layers
        self.heads = nn.ModuleList(HydraHead(i, width, vocab_size, num_layers) for i in range(num_heads))

    def logits(self, number: int, states_NH: torch.Tensor, path: Sequence[torch.Tensor]) -> torch.Tensor:
        """[N, V] of head `number`. `path`: the embeddings [N, H] of the newest token and of the `number` tokens drafted
        after it."""
        assert len(path) == number + 1, "a head reads as many tokens as lie above what it predicts"
        out: torch.Tensor = self.heads[number](torch.cat([states_NH, *path], -1))
        return out
