"""Additive attention masks for a tree behind a left-aligned context, one per kind of attention layer.

A query sees every committed token and its own uncommitted ancestors; in a sliding layer only those less than a window
away, by position. infer/models/architectures.py says which plan a model needs.

Legend: B rows, Q queries, S slots, F uncommitted entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch


class RowState(Protocol):
    """A row's committed length, and the positions and ancestors (a bit mask) of its uncommitted entries."""

    length: int
    positions: list[int]
    visible: list[int]


@dataclass(frozen=True, slots=True)
class MaskPlan:
    """`windows`: layer kind -> window (None: the whole context). `by_kind`: the model takes one mask per kind."""

    windows: dict[str, int | None] = field(default_factory=lambda: {"full_attention": None})
    by_kind: bool = False

    def build(
        self,
        slots: Sequence[RowState],
        counts: list[int],
        width: int,
        end: int,
        device: torch.device,
        dtype: torch.dtype,
        positions_BQ: np.ndarray,
    ) -> Any:
        """The model's mask argument for the newest `counts` uncommitted entries of each row."""
        return self._masks(_visibility(slots, counts, width, end), slots, counts, end, device, dtype, positions_BQ)

    def build_at(
        self,
        slots: Sequence[RowState],
        chosen: Sequence[Sequence[int]],
        slots_BQ: np.ndarray,
        device: torch.device,
        dtype: torch.dtype,
        positions_BQ: np.ndarray,
    ) -> Any:
        """The same for the entries in slots `chosen` of each row, committed or not; `slots_BQ` holds these slots, then
        those of padding queries."""
        end = int(slots_BQ.max()) + 1
        seen_BQS = _visibility_at(slots, chosen, slots_BQ, end)
        counts = [len(one) for one in chosen]
        return self._masks(seen_BQS, slots, counts, end, device, dtype, positions_BQ)

    def _masks(
        self,
        seen_BQS: np.ndarray,
        slots: Sequence[RowState],
        counts: list[int],
        end: int,
        device: torch.device,
        dtype: torch.dtype,
        positions_BQ: np.ndarray,
    ) -> Any:
        masks = {}
        for kind, window in self.windows.items():
            shown_BQS = seen_BQS
            if window is not None and int(positions_BQ.max()) + 1 > window:
                shown_BQS = seen_BQS & _near(slots, counts, positions_BQ, window, end)
            hidden_BQS = torch.from_numpy(~shown_BQS).to(device)
            mask = torch.zeros(hidden_BQS.shape, dtype=dtype, device=device)
            masks[kind] = mask.masked_fill_(hidden_BQS, torch.finfo(dtype).min)[:, None]
        return masks if self.by_kind else next(iter(masks.values()))


def _visibility(slots: Sequence[RowState], counts: list[int], width: int, end: int) -> np.ndarray:
    """[B, Q, S] bool: a query sees the context, its ancestors and itself; a padding query only itself."""
    seen_BQS = np.zeros((len(slots), width, end), dtype=bool)
    for b, (slot, count) in enumerate(zip(slots, counts)):
        before = len(slot.positions) - count
        if count:
            seen_BQS[b, :count, : slot.length] = True
            uncommitted = before + count
            seen_BQS[b, :count, slot.length : slot.length + uncommitted] = _bits(slot.visible[before:], uncommitted)
        start = slot.length + before
        for query in range(count, width):
            seen_BQS[b, query, start + query] = True
    return seen_BQS


def _visibility_at(
    slots: Sequence[RowState], chosen: Sequence[Sequence[int]], slots_BQ: np.ndarray, end: int
) -> np.ndarray:
    """[B, Q, S] bool: a committed entry sees those before it, an uncommitted one the context and its ancestors."""
    seen_BQS = np.zeros((*slots_BQ.shape, end), dtype=bool)
    for b, (slot, wanted) in enumerate(zip(slots, chosen)):
        for query, at in enumerate(wanted):
            seen_BQS[b, query, : min(at + 1, slot.length)] = True
        uncommitted = [(query, at - slot.length) for query, at in enumerate(wanted) if at >= slot.length]
        if uncommitted:
            queries = [query for query, _ in uncommitted]
            shown = min(len(slot.positions), end - slot.length)
            bits_QF = _bits([slot.visible[at] for _, at in uncommitted], len(slot.positions))[:, :shown]
            seen_BQS[b, queries, slot.length : slot.length + shown] = bits_QF
        for query in range(len(wanted), slots_BQ.shape[1]):
            seen_BQS[b, query, slots_BQ[b, query]] = True
    return seen_BQS


def _bits(masks: list[int], uncommitted: int) -> np.ndarray:
    """[Q, F] bool from bit masks, lowest bit first."""
    size = (uncommitted + 7) // 8
    raw = np.frombuffer(b"".join(mask.to_bytes(size, "little") for mask in masks), dtype=np.uint8)
    return np.unpackbits(raw.reshape(len(masks), size), axis=1, bitorder="little")[:, :uncommitted].view(bool)


def _near(slots: Sequence[RowState], counts: list[int], positions_BQ: np.ndarray, window: int, end: int) -> np.ndarray:
    """[B, Q, S] bool: less than `window` positions away. A committed slot's position is its index."""
    near_BQS = np.ones((len(slots), positions_BQ.shape[1], end), dtype=bool)
    for b, (slot, count) in enumerate(zip(slots, counts)):
        positions_S = np.arange(end)
        uncommitted = slot.positions[: max(end - slot.length, 0)]
        positions_S[slot.length : slot.length + len(uncommitted)] = uncommitted
        near_BQS[b, :count] = positions_BQ[b, :count, None] - positions_S[None] < window
    return near_BQS
