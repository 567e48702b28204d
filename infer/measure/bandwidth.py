"""What this machine's memory can deliver: the limit of decoding one token at a time, which reads every weight once."""

from __future__ import annotations

import time

import torch

SIZE = 256 << 20
TRIES = 5


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second at which a buffer far larger than the caches is summed; the best of a few tries."""
    buffer = torch.ones(SIZE // 4, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(TRIES + 1):
        began = time.perf_counter()
        float(buffer.sum())
        best = min(best, time.perf_counter() - began)
    return SIZE / best
