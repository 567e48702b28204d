"""The memory of all rows of a model: slots for keys and values, in which every row has a region of its own.

A region is a little larger than what its row holds and moves to a larger place when the row outgrows it, so rows of
uneven length take what they hold and not the length of the longest. A region that several rows read is held once.

Legend: S slots, H heads, D head size, N new entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

# Slot 0 belongs to no row: padding is written to it.
SCRATCH = 1
# Spare room of a region when it is laid out anew: this share of what it held at most, and this many slots.
SPARE_SHARE, SPARE_SLOTS = 16, 12
# Unused slots that are given back: when they are more than this share of the used ones, beyond this many.
IDLE_SHARE, IDLE_SLOTS = 6, 256
# A lasting arena has at least LASTING_SLOTS slots, and its regions this much room to grow where they are.
LASTING_SLOTS, LASTING_SHARE, LASTING_SPARE = 256, 4, 64


@dataclass(eq=False, slots=True)
class Region:
    """`size` slots from `start` on; `peak` is the most that were ever used. `users`: rows that read it. `fixed`: no
    row will write to it again."""

    start: int = 0
    size: int = 0
    peak: int = 0
    users: int = 1
    fixed: bool = False


class _Move(NamedTuple):
    """A region, where it lay and how large it was, and where it will lie."""

    region: Region
    old_start: int
    old_size: int
    start: int
    size: int


class _Layout(NamedTuple):
    """Where all regions will lie, and the number of slots then, which is never the number of slots now."""

    moves: list[_Move]
    size: int


class Arena:
    """Buffers [H, S, D] of keys and values per layer, and [S, D] of the states between blocks of layers.

    They take the shape of the first keys and values, not of the config, so grouped, multi-query and unequal heads fit.
    It is the cache that transformers' attention layers write to; `begin` sets where the next pass writes.

    `lasting`: buffers stay where they are as long as there is room, because captured passes hold their addresses. They
    hold a power of two of slots, or one more, and never shrink; a region that outgrows its place moves within them, and
    what a row leaves behind is zeroed, because captured passes read the slots of others with weight 0. `generation`
    counts how often the buffers were replaced.
    """

    is_compileable = False

    def __init__(self, lasting: bool = False) -> None:
        self.lasting = lasting
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.states: list[torch.Tensor] = []
        self.size = SCRATCH
        self.largest = SCRATCH
        self.moved = 0  # how often the regions were laid out anew
        self.generation = 0
        self._regions: list[Region] = []
        self._layout: _Layout | None = None
        self._slots_N: torch.Tensor | None = None
        self._first = self._count = 0

    # regions

    def region(self) -> Region:
        """A new region without slots; `ensure` gives it some."""
        self._settle()
        region = Region()
        self._regions.append(region)
        return region

    def release(self, region: Region) -> None:
        """One user less; the slots are free after the last."""
        self._settle()
        region.users -= 1
        if region.users == 0:
            if self.lasting:
                self._clear(region)
            self._regions.remove(region)
            self._shrink()

    @torch.inference_mode()
    def _clear(self, region: Region) -> None:
        for buffer_HSD in (*self.keys, *self.values):
            buffer_HSD.narrow(1, region.start, region.size).zero_()

    def split(self, region: Region, at: int) -> Region:
        """Cut off the first `at` slots of `region` as a region of their own."""
        self._settle()
        head = Region(region.start, at, at, fixed=True)
        region.start, region.size = region.start + at, region.size - at
        region.peak = max(region.peak - at, 0)
        self._regions.append(head)
        return head

    @torch.inference_mode()
    def ensure(self, needed: Mapping[Region, int]) -> None:
        """Give each region at least these many slots; what they hold is kept."""
        self._settle()
        for region, slots in needed.items():
            region.peak = max(region.peak, slots)
        short = [region for region, slots in needed.items() if slots > region.size]
        if short and not all(self._place(region) for region in short):
            self._lay_out()

    def _place(self, region: Region) -> bool:
        """Put a region into a gap, if one is large enough; if it holds something, only in a lasting arena."""
        wanted, end = self._roomy(region), SCRATCH
        if region.size and not self.lasting:
            return False
        taken = sorted((one for one in self._regions if one.size), key=lambda one: one.start)
        for start, after in [*((one.start, one.start + one.size) for one in taken), (self.size, 0)]:
            if start - end >= wanted:
                self._copy(region, end)
                region.start, region.size = end, wanted
                return True
            end = after
        return False

    def _copy(self, region: Region, start: int) -> None:
        """Copy what a region holds to other slots, which must be free. Repeating it changes nothing."""
        if region.size:
            for buffers, dim in ((self.keys, 1), (self.values, 1), (self.states, 0)):
                for buffer in buffers:
                    buffer.narrow(dim, start, region.size).copy_(buffer.narrow(dim, region.start, region.size))

    def _shrink(self) -> None:
        if self.lasting:
            return
        used = sum(region.size for region in self._regions)
        if self.size > used + used // IDLE_SHARE + IDLE_SLOTS:
            self._lay_out()

    def _lay_out(self) -> None:
        """Give every region a place and a size anew, and move what it holds."""
        moves, end = [], SCRATCH
        for region in sorted(self._regions, key=lambda one: one.start):
            size = self._roomy(region)
            moves.append(_Move(region, region.start, region.size, end, size))
            end += size
        if self.lasting:
            held = 1 << (self.size.bit_length() - 1)
            end = max(LASTING_SLOTS, held, 1 << (end - 1).bit_length())
        self._layout = _Layout(moves, end + (end == self.size))
        self._settle()

    @torch.inference_mode()
    def _settle(self) -> None:
        """Finish a layout, buffer after buffer; if this is interrupted, the next call goes on from there."""
        layout = self._layout
        if layout is None:
            return
        for buffers, dim in ((self.keys, 1), (self.values, 1), (self.states, 0)):
            for layer, old in enumerate(buffers):
                if old.shape[dim] == layout.size:
                    continue
                new = old.new_zeros([*old.shape[:dim], layout.size, *old.shape[dim + 1 :]])
                for move in layout.moves:
                    count = min(move.old_size, move.size)
                    new.narrow(dim, move.start, count).copy_(old.narrow(dim, move.old_start, count))
                buffers[layer] = new
        for move in layout.moves:
            move.region.start, move.region.size = move.start, move.size
        self.moved += bool(self.keys)
        self.generation += 1
        self.size, self.largest = layout.size, max(layout.size, self.largest)
        self._layout = None

    # what a pass writes

    def begin(self, first: int, count: int, slots_N: torch.Tensor | None = None) -> None:
        """The next pass writes its `count` entries to these slots, or, without `slots_N`, to those from `first` on."""
        self._first, self._count, self._slots_N = first, count, slots_N

    def update(
        self, key_1HND: torch.Tensor, value_1HND: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one layer's new entries; the whole buffers [1, H, S, D], which attention reads by slots."""
        if layer_idx == len(self.keys):
            for buffers, new in ((self.keys, key_1HND), (self.values, value_1HND)):
                buffers.append(new.new_zeros((new.shape[1], self.size, new.shape[3])))
        keys_HSD, values_HSD = self.keys[layer_idx], self.values[layer_idx]
        self._write(keys_HSD, key_1HND[0], 1)
        self._write(values_HSD, value_1HND[0], 1)
        return keys_HSD[None], values_HSD[None]

    def put_states(self, block: int, states_ND: torch.Tensor) -> None:
        """Store the states in which the entries of the current pass left a block."""
        assert block <= len(self.states)
        if block == len(self.states):
            self.states.append(states_ND.new_zeros((self.size, states_ND.shape[-1])))
        self._write(self.states[block], states_ND, 0)

    def states_now(self, block: int) -> torch.Tensor:
        """[N, D] the states after a block of the entries in the slots of the current pass."""
        if self._slots_N is None:
            return self.states[block][self._first : self._first + self._count]
        return self.states[block].index_select(0, self._slots_N)

    def _write(self, buffer: torch.Tensor, new: torch.Tensor, dim: int) -> None:
        if self._slots_N is None:
            buffer.narrow(dim, self._first, new.shape[dim]).copy_(new)
        else:
            buffer.index_copy_(dim, self._slots_N, new)

    @torch.inference_mode()
    def move(self, from_N: torch.Tensor, to_N: torch.Tensor) -> None:
        """Copy the entries in slots `from_N` to `to_N`, for all rows in one operation per buffer."""
        for buffers in (self.keys, self.values):
            for buffer_HSD in buffers:
                buffer_HSD.index_copy_(1, to_N, buffer_HSD.index_select(1, from_N))
        for buffer_SD in self.states:
            buffer_SD.index_copy_(0, to_N, buffer_SD.index_select(0, from_N))

    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(t.nbytes for buffers in (self.keys, self.values) for t in buffers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """For models that ask; positions and masks are always given to them."""
        return self.size

    def _roomy(self, region: Region) -> int:
        """The slots of a region that is laid out anew."""
        if region.fixed:
            return region.peak
        if self.lasting:
            return region.peak + region.peak // LASTING_SHARE + LASTING_SPARE
        return region.peak + region.peak // SPARE_SHARE + SPARE_SLOTS
