"""How much arithmetic a training step asks for, and what share of the device's it comes to (MFU).

Model FLOPs as the field counts them: 6 per weight of a matrix and token (2 forward, 4 backward). What is computed again
for gradient checkpointing or chunked losses is not counted, nor is attention, whose share is about T / (12 D) of a
layer's. It knows no clock.

Legend: T positions of a row, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch

from draftsmith.infer.models.layers import find_parts

# Dense bfloat16 FLOP/s by what the device's name holds, from the makers' data sheets.
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


def step_flops(model: Any, num_exits: int, positions: int, learned: int) -> float:
    """Of one optimiser step over `positions` tokens, `learned` of which pass the head once for each exit."""
    parts = find_parts(model)
    layers = sum(weight.numel() for weight in parts.layers.parameters() if weight.ndim == 2)
    head: Any = parts.head
    return 6.0 * (layers * positions + head.weight.numel() * learned * num_exits)


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bfloat16 FLOP/s; None for one that is not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)
