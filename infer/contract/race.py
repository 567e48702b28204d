"""The race by which a row's target draws its own tokens, with noise that a draft may share (arXiv 2408.07978).

Token x arrives at time E_x / probs_x, where E is exponential noise; the first to arrive is a draw from `probs`. The
noise of a position is a function of (seed, row, position) and of nothing else, so it decides the same token whatever
was drafted. A draft that lets its own tokens run the same race ranks the target's next token higher than one that does
not know the noise, and what it takes is still outright: the draw does not depend on it.

Everything is in logarithms: the first to arrive has the largest logit - log E.

Legend: V vocabulary.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
import torch

from draftsmith.infer.contract.rng import key

# Target and draft need the same positions, a few steps long.
CACHED_BYTES = 1 << 26


class RaceNoise:
    """[V] float64 -log E of positions; the newest are kept, up to `most_bytes`.

    A CPU's noise is NumPy's Philox generator, whatever the number of threads. Another device makes its own.
    """

    def __init__(self, most_bytes: int = CACHED_BYTES) -> None:
        self.most_bytes = most_bytes
        self.kept_bytes = 0
        self._kept: OrderedDict[tuple[int, str, int, int, torch.device], torch.Tensor] = OrderedDict()
        self._generators: dict[torch.device, torch.Generator] = {}
        self._lock = threading.Lock()

    def at(self, seed: int, row: str, position: int, size: int, device: torch.device) -> torch.Tensor:
        name = (seed, row, position, size, device)
        with self._lock:
            noise_V = self._kept.pop(name, None)
            if noise_V is None:
                noise_V = self._make(key(seed, row, position, "race"), size, device)
                self.kept_bytes += noise_V.nbytes
            self._kept[name] = noise_V
            while self.kept_bytes > self.most_bytes and len(self._kept) > 1:
                self.kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        return noise_V

    def _make(self, number: int, size: int, device: torch.device) -> torch.Tensor:
        if device.type == "cpu":
            times_V = np.random.Generator(np.random.Philox(key=number)).standard_exponential(size)
            # A time of 0, as rare as it is, would beat tokens of any probability, and tie with tokens of none.
            noise_V = torch.from_numpy(np.maximum(times_V, np.finfo(np.float64).tiny))
        else:
            generator = self._generators.setdefault(device, torch.Generator(device))
            generator.manual_seed(number >> 65)
            noise_V = torch.empty(size, dtype=torch.float64, device=device).exponential_(generator=generator)
            noise_V.clamp_(min=torch.finfo(torch.float64).tiny)
        return noise_V.log_().neg_()


NOISE = RaceNoise()


def race_noise(seed: int, row: str, position: int, size: int, device: torch.device) -> torch.Tensor:
    """[V] float64: what the race adds to the logits of the token at `position`. Not to be changed in place."""
    return NOISE.at(seed, row, position, size, device)


def first(logits_V: torch.Tensor, seed: int, row: str, position: int) -> int:
    """The token that wins the race at `position`: a draw from softmax(logits)."""
    noise_V = race_noise(seed, row, position, logits_V.numel(), logits_V.device)
    return int((logits_V.double() + noise_V).argmax())
