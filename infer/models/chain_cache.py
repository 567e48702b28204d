"""The cache of models with recurrent states: keys and values in slots, and the states of one segment of a pass.

Rows are left-aligned: the token at position t is in slot t. A recurrent or convolution state has no slots: it is the
sum of all tokens so far. So each segment works on copies of its rows' states and hands the new ones back, and the old
ones remain to go on from. The methods are those that transformers' layers call (transformers/cache_utils.py).

Legend: B rows of a segment, Q queries, S slots, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

GROWTH = 256
# A row's states by (kind, layer, number): convolution inputs or a recurrent state, each [1, ...].
States = dict[tuple[str, int, int], torch.Tensor]


class ChainCache:
    """`begin` sets the rows, slots and states of the next segment; buffers take the shape of the first keys, values."""

    is_compileable = False

    def __init__(self) -> None:
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.rows = 0
        self.slots = 0
        self._rows_B: slice | torch.Tensor = slice(0)
        self._index_B1 = torch.zeros(0)
        self._slots_BQ = torch.zeros(0)
        self._end = 0
        self._width = 0
        self._working: States = {}

    def begin(self, rows: Sequence[int], slots_BQ: torch.Tensor, states: Sequence[States]) -> None:
        """The next segment runs these rows, writes these slots and continues from these states."""
        first, count = rows[0], len(rows)
        contiguous = list(rows) == list(range(first, first + count))
        index_B = torch.tensor(rows, device=slots_BQ.device)
        self._rows_B = slice(first, first + count) if contiguous else index_B
        self._index_B1 = index_B[:, None]
        self._slots_BQ = slots_BQ
        self._end, self._width = int(slots_BQ.max()) + 1, slots_BQ.shape[1]
        # Copies even of one row: some layers write into the state that they are given.
        self._working = {key: torch.cat([state[key] for state in states]) for key in states[0]}

    def states(self) -> list[States]:
        """Each row's states after the segment."""
        count = len(self._index_B1)
        return [{key: state_B[b : b + 1] for key, state_B in self._working.items()} for b in range(count)]

    @torch.inference_mode()
    def reserve(self, rows: int, slots: int) -> None:
        """Grow to at least this many rows and slots, keeping what is stored."""
        if rows <= self.rows and slots <= self.slots:
            return
        self.rows = max(rows, self.rows)
        if slots > self.slots:
            self.slots = max(slots, self.slots + GROWTH)
        for buffers in (self.keys, self.values):
            for layer, old_BSHD in buffers.items():
                new_BSHD = old_BSHD.new_zeros((self.rows, self.slots, *old_BSHD.shape[2:]))
                new_BSHD[: old_BSHD.shape[0], : old_BSHD.shape[1]] = old_BSHD
                buffers[layer] = new_BSHD

    @torch.inference_mode()
    def move_row(self, source: int, target: int, used: int) -> None:
        """Copy the first `used` slots of row `source` to row `target`."""
        for buffers in (self.keys, self.values):
            for buffer_BSHD in buffers.values():
                buffer_BSHD[target, :used] = buffer_BSHD[source, :used]

    # attention layers

    def update(
        self, key_BHQD: torch.Tensor, value_BHQD: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one layer's new entries; return its keys and values up to the last slot in use."""
        shown = []
        for buffers, new_BHQD in ((self.keys, key_BHQD), (self.values, value_BHQD)):
            if layer_idx not in buffers:
                buffers[layer_idx] = new_BHQD.new_zeros((self.rows, self.slots, *new_BHQD.shape[1::2]))
            buffer_BSHD = buffers[layer_idx]
            buffer_BSHD[self._index_B1, self._slots_BQ] = new_BHQD.transpose(1, 2)
            shown.append(buffer_BSHD[self._rows_B, : self._end].transpose(1, 2))
        return shown[0], shown[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The tokens before this segment, in the longest row."""
        return self._end - self._width

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._end, 0

    # recurrent layers

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return bool(self._working)

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._working.get(("conv", layer_idx, state_idx))

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Append inputs to a convolution's; keeps the last of them, returns all."""
        key = ("conv", layer_idx, state_idx)
        before = self._working.get(key)
        if before is None:
            size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            known = torch.nn.functional.pad(conv_states, (max(size - conv_states.shape[-1], 0), 0))
        else:
            size = before.shape[-1]
            known = torch.cat([before, conv_states], dim=-1)
        self._working[key] = known[..., known.shape[-1] - size :]
        return known

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._working.get(("recurrent", layer_idx, state_idx))

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        self._working["recurrent", layer_idx, state_idx] = recurrent_states
        return recurrent_states
