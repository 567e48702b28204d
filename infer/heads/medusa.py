"""Medusa heads (arXiv 2401.10774): head i predicts the token i + 2 places after the one whose state it reads.

The state is the target's last one, after the final norm, at the newest token that the target has read; what it predicts
itself is the newest token of the row. Each head is a few residual blocks and an output matrix of its own.

Legend: N states, H width, K heads, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn


class ResidualBlock(nn.Module):
    """h + SiLU(W h + b); both are zero at first, so that the block changes nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = states + nn.functional.silu(self.linear(states))
        return out


class MedusaHead(nn.Module):
    def __init__(self, width: int, vocab_size: int, num_layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(num_layers))
        self.lm_head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            states = block(states)
        out: torch.Tensor = self.lm_head(states)
        return out


class MedusaHeads(nn.Module):
    """The heads of one target, whose states are `width` wide."""

    features = ("last",)

    def __init__(self, width: int, vocab_size: int, num_heads: int, num_layers: int = 1) -> None:
        super().__init__()
        if min(width, vocab_size, num_heads, num_layers) < 1:
            raise ValueError("Medusa heads need a width, a vocabulary, heads and layers of at least 1")
        self.width = width
        self.vocab_size = vocab_size
        self.num_layers = num_layers
        self.heads = nn.ModuleList(MedusaHead(width, vocab_size, num_layers) for _ in range(num_heads))

    def forward(self, states_NH: torch.Tensor, count: int | None = None) -> torch.Tensor:
        """[N, K, V] logits of all heads, or of the first `count`: head i's are of the token i + 2 places after the
        state's own."""
        return torch.stack([head(states_NH) for head in self.heads[:count]], 1)
