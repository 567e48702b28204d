"""What moves between the host and a device, in as few pieces as possible, and counted.

On a GPU every transfer costs microseconds of latency however small it is, and a download waits for all that was queued
before it. So what a pass needs goes up as one tensor, and what a step decides comes down as one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

WORD = 8

Numbers = Sequence[int] | np.ndarray


class Transfers:
    """Uploads and downloads of one model's passes. `uploads` and `downloads` count them, also where both ends are the
    CPU, so that tests can."""

    def __init__(self) -> None:
        self.uploads = 0
        self.downloads = 0

    def up(self, device: torch.device, *parts: Sequence[int]) -> list[torch.Tensor]:
        """Each part on the device, as int64."""
        self.uploads += 1
        words = np.array([number for part in parts for number in part], dtype=np.int64)
        return list(_sent(words, device).split([*map(len, parts)]))

    def up_with(
        self, device: torch.device, seen: Sequence[np.ndarray], *parts: Sequence[int]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """As `up`, with bool arrays in the same upload; parts and arrays, these in their own shapes."""
        if not seen:
            return self.up(device, *parts), []
        self.uploads += 1
        numbers = sum(map(len, parts))
        sizes = [array.size for array in seen]
        words = np.empty(numbers - (-sum(sizes) // WORD), dtype=np.int64)
        words[:numbers] = [number for part in parts for number in part]
        flags = words[numbers:].view(np.bool_)
        np.concatenate([array.ravel() for array in seen], out=flags[: sum(sizes)])
        flags[sum(sizes) :] = False
        packed = _sent(words, device)
        shown = packed[numbers:].view(torch.bool)[: sum(sizes)].split(sizes)
        return (
            list(packed[:numbers].split([*map(len, parts)])),
            [one.view(array.shape) for one, array in zip(shown, seen)],
        )

    def up_into(self, buffer: torch.Tensor, *parts: Numbers) -> None:
        """Fill a buffer that stays where it is, from its start."""
        self.uploads += 1
        words = np.concatenate(parts, dtype=np.int64)
        buffer[: len(words)].copy_(_pinned(words, buffer.device), non_blocking=True)

    def down(self, tensor: torch.Tensor) -> list[int]:
        """Its numbers, once everything queued before has run."""
        self.downloads += 1
        numbers: list[int] = tensor.tolist()
        return numbers

    def down_array(self, tensor: torch.Tensor) -> np.ndarray:
        """The same as an array."""
        self.downloads += 1
        return tensor.cpu().numpy()


def _sent(words: np.ndarray, device: torch.device) -> torch.Tensor:
    return _pinned(words, device).to(device, non_blocking=True)


def _pinned(words: np.ndarray, device: torch.device) -> torch.Tensor:
    """From pinned memory a copy does not wait; torch gives it to others when the copy has run."""
    host = torch.from_numpy(words)
    return host.pin_memory() if device.type == "cuda" else host
