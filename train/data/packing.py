"""Which samples share a row: best-fit packing of shuffled samples, as a pure function of seed and epoch.

The packs of all epochs form one endless stream. Any pack can be computed without consuming those before it, so a
resumed run continues exactly where it stopped.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict

import numpy as np

WINDOW = 4096
EPOCHS_KEPT = 2


def pack(lengths: np.ndarray, capacity: int, order: np.ndarray) -> list[list[int]]:
    """Samples in packs of at most `capacity` tokens. Within windows of `order` the longest go first, each into the pack
    that it fills best."""
    assert len(lengths) == 0 or lengths.max() <= capacity
    packs: list[list[int]] = []
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        window = window[np.argsort(-lengths[window], kind="stable")]
        room: list[tuple[int, int]] = []
        for sample in window.tolist():
            length = int(lengths[sample])
            at = bisect_left(room, (length, -1))
            if at < len(room):
                left, index = room.pop(at)
                packs[index].append(sample)
            else:
                left, index = capacity, len(packs)
                packs.append([sample])
            if left > length:
                insort(room, (left - length, index))
    return packs


class PackStream:
    """Packs 0, 1, 2, ... over all epochs. `chosen` are the samples to use; pack contents are sample numbers."""

    def __init__(
        self, lengths: np.ndarray, loss_counts: np.ndarray, chosen: np.ndarray, capacity: int, seed: int, shuffle: bool
    ) -> None:
        self.capacity = capacity
        self._lengths = lengths
        self._loss_counts = loss_counts
        self._chosen = chosen
        self._seed = seed
        self._shuffle = shuffle
        self._starts = [0]
        self._epochs: OrderedDict[int, list[list[int]]] = OrderedDict()

    def packs_in(self, epochs: float) -> int:
        """The number of packs in `epochs`; a fraction of an epoch is that fraction of its packs."""
        whole, part = int(epochs), epochs - int(epochs)
        last = round(part * len(self._epoch(whole))) if part else 0
        return self._start(whole) + last

    def pack(self, number: int) -> list[int]:
        epoch = 0
        while self._start(epoch + 1) <= number:
            epoch += 1
        return self._epoch(epoch)[number - self._start(epoch)]

    def loss_tokens(self, number: int) -> int:
        return int(self._loss_counts[self.pack(number)].sum())

    def filled(self) -> float:
        """The share of positions in the first epoch's packs that hold a token."""
        packs = self._epoch(0)
        return float(sum(self._lengths[pack].sum() for pack in packs) / (len(packs) * self.capacity))

    def _start(self, epoch: int) -> int:
        while len(self._starts) <= epoch:
            self._starts.append(self._starts[-1] + len(self._epoch(len(self._starts) - 1)))
        return self._starts[epoch]

    def _epoch(self, epoch: int) -> list[list[int]]:
        if epoch not in self._epochs:
            self._epochs[epoch] = self._make(epoch)
            if len(self._epochs) > EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(epoch)
        return self._epochs[epoch]

    def _make(self, epoch: int) -> list[list[int]]:
        if not self._shuffle:
            return pack(self._lengths, self.capacity, self._chosen)
        random = np.random.default_rng([self._seed, epoch])
        packs = pack(self._lengths, self.capacity, random.permutation(self._chosen))
        return [packs[i] for i in random.permutation(len(packs))]
