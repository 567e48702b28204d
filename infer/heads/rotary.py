"""Rotations of positions, whose frequencies keep their precision."""

from __future__ import annotations

from typing import Any

from torch import nn


class KeptRotary(nn.Module):
    """A family's rotary embedding. Its frequencies follow the module to another device, but never to another dtype."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = dict(self.rotary.named_buffers())
        moved = super()._apply(fn, recurse)
        for name, buffer in kept.items():
            self.rotary._buffers[name] = buffer.to(getattr(self.rotary, name).device)
        return moved

    def forward(self, states: Any, position_ids: Any) -> Any:
        return self.rotary(states, position_ids)
