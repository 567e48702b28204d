"""What the tokens of a pass see, row by row: runs of slots in the arena, whole or masked.

A query sees every committed token and its own uncommitted ancestors; in a sliding layer only those less than a window
away, by position and never by slot. What all queries of a row see is left without a mask, so nothing that a pass
allocates grows with the context; only the tree behind it, and the edge of a window, are masked.

Legend: Q queries of a row, N tokens of a pass, S slots, K slots of a piece, U uncommitted entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

# Up to this number of slots, one masked call is cheaper than two calls and merging them.
AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class MaskPlan:
    """`windows`: layer kind -> window (None: the whole context). `by_kind`: the model takes one mask per kind.

    `packed`: its layers call our attention; else each takes one dense mask over all slots."""

    windows: dict[str, int | None] = field(default_factory=lambda: {"full_attention": None})
    by_kind: bool = False
    packed: bool = True


@dataclass(frozen=True, slots=True)
class ChainPlan:
    """How a family reads a chain: `windows` maps layer kind -> window (None: the whole context), `by_kind` says that it
    takes one mask per kind, and `single` that, with a state, it reads one token at a time and no more."""

    windows: Mapping[str, int | None] = field(default_factory=lambda: {"full_attention": None})
    by_kind: bool = False
    single: bool = False


@dataclass(slots=True)
class RowSlots:
    """Where a row's tokens are: `spans` of (first slot, count) hold the committed ones in order; its uncommitted
    entries, with positions and ancestors (bit masks), follow in the last span's region."""

    spans: list[tuple[int, int]]
    positions: list[int]
    visible: list[int]

    @property
    def length(self) -> int:
        return sum(count for _, count in self.spans)

    def runs(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The (first slot, count) of the entries from `start` up to `end`, committed ones first, then the others."""
        at = 0
        last = len(self.spans) - 1
        for i, (slot, count) in enumerate(self.spans):
            room = count + len(self.positions) if i == last else count
            low, high = max(start, at), min(end, at + room)
            if low < high:
                yield slot + low - at, high - low
            at += count

    def slots(self, entries: Sequence[int]) -> list[int]:
        """The slots of entries, by number: committed ones first, then the uncommitted ones."""
        if len(self.spans) == 1:
            first = self.spans[0][0]
            return [first + entry for entry in entries]
        table = [slot + i for slot, count in self.runs(0, self.length + len(self.positions)) for i in range(count)]
        return [table[entry] for entry in entries]


@dataclass(frozen=True, slots=True)
class SlotRun:
    """A run of slots, and which of them each query sees; None: all of them."""

    start: int
    count: int
    seen_QK: np.ndarray | None = None


def pieces(row: RowSlots, chosen: Sequence[int], window: int | None) -> list[SlotRun]:
    """What the entries `chosen` of a row, by number, see in layers with this window."""
    length = row.length
    if len(chosen) == 1 and (chosen[0] < length or row.visible[chosen[0] - length] == (1 << len(row.visible)) - 1):
        # One token that sees all before it: plain decoding, and a chain. There a token's position is its number.
        end = chosen[0] + 1
        return [SlotRun(*run) for run in row.runs(0 if window is None else max(end - window, 0), end)]
    positions_Q = np.array([entry if entry < length else row.positions[entry - length] for entry in chosen])
    whole_end = min(length, *chosen)
    end = chosen[-1] + 1 if chosen[-1] < length else length + len(row.positions)
    found: list[SlotRun] = []
    whole_start = 0
    if window is not None and int(positions_Q.max()) >= window:
        start = max(int(positions_Q.min()) - window + 1, 0)
        whole_start = min(int(positions_Q.max()) - window + 1, whole_end)
        near_QK = positions_Q[:, None] - np.arange(start, whole_start) < window
        found += _cut(row, start, whole_start, near_QK)
    tail_QK = _tail(row, chosen, positions_Q, length, whole_end, end, window)
    if tail_QK.all():
        whole_end, tail_QK = end, tail_QK[:, :0]
    found += _cut(row, whole_start, whole_end, None)
    found += _cut(row, whole_end, end, tail_QK)
    return _joined(found, len(chosen))


def _tail(
    row: RowSlots,
    chosen: Sequence[int],
    positions_Q: np.ndarray,
    length: int,
    start: int,
    end: int,
    window: int | None,
) -> np.ndarray:
    """[Q, K] which of the entries from `start` up to `end` each chosen one sees: those before it if it is committed,
    else the context and its ancestors; each itself."""
    seen_QK = np.zeros((len(chosen), end - start), dtype=bool)
    committed = sum(entry < length for entry in chosen)
    if start < length:
        shown = min(length, end) - start
        limit_Q1 = np.array([min(entry, length) for entry in chosen])[:, None]
        seen_QK[:, :shown] = np.arange(start, start + shown) <= limit_Q1
    if committed < len(chosen):
        bits_QU = _bits([row.visible[entry - length] for entry in chosen[committed:]], len(row.positions))
        seen_QK[committed:, max(length - start, 0) :] = bits_QU
    if window is not None:
        positions_K = np.array([at if at < length else row.positions[at - length] for at in range(start, end)])
        seen_QK &= positions_Q[:, None] - positions_K[None] < window
    return seen_QK


def _bits(masks: list[int], uncommitted: int) -> np.ndarray:
    """[Q, U] bool from bit masks, lowest bit first."""
    size = (uncommitted + 7) // 8
    raw = np.frombuffer(b"".join(mask.to_bytes(size, "little") for mask in masks), dtype=np.uint8)
    return np.unpackbits(raw.reshape(len(masks), size), axis=1, bitorder="little")[:, :uncommitted].view(bool)


def _cut(row: RowSlots, start: int, end: int, seen_QK: np.ndarray | None) -> list[SlotRun]:
    """The entries from `start` up to `end` as pieces, one per run of slots."""
    found, at = [], 0
    for slot, count in row.runs(start, end):
        found.append(SlotRun(slot, count, None if seen_QK is None else seen_QK[:, at : at + count]))
        at += count
    return found


def _joined(found: list[SlotRun], queries: int) -> list[SlotRun]:
    """Neighbouring pieces as one, if they are short or have no mask."""
    joined: list[SlotRun] = []
    for piece in found:
        last = joined[-1] if joined else None
        if last is not None and last.start + last.count == piece.start:
            count = last.count + piece.count
            if last.seen_QK is None and piece.seen_QK is None:
                joined[-1] = SlotRun(last.start, count)
                continue
            if count <= AT_ONCE:
                sides = [
                    np.ones((queries, one.count), dtype=bool) if one.seen_QK is None else one.seen_QK
                    for one in (last, piece)
                ]
                joined[-1] = SlotRun(last.start, count, np.concatenate(sides, axis=1))
                continue
        joined.append(piece)
    return joined


def additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where something is seen, the lowest number elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
