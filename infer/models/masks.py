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
        rows: Sequence[RowState],
        chosen: Sequence[Sequence[int]],
        slots_BQ: np.ndarray,
        positions_BQ: np.ndarray,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Any:
        """The model's mask argument for the entries in slots `chosen` of each row, committed or not.

        `slots_BQ` holds these slots, then those of padding queries."""
        end = int(slots_BQ.max()) + 1
        seen_BQS = _visibility(rows, chosen, slots_BQ, end)
        counts = [len(wanted) for wanted in chosen]
        masks = {}
        for kind, window in self.windows.items():
            shown_BQS = seen_BQS
            if window is not None and int(positions_BQ.max()) + 1 > window:
                shown_BQS = seen_BQS & _near(rows, counts, positions_BQ, window, end)
            hidden_BQS = torch.from_numpy(~shown_BQS).to(device)
            mask = torch.zeros(hidden_BQS.shape, dtype=dtype, device=device)
            masks[kind] = mask.masked_fill_(hidden_BQS, torch.finfo(dtype).min)[:, None]
        return masks if self.by_kind else next(iter(masks.values()))


def _visibility(
    rows: Sequence[RowState], chosen: Sequence[Sequence[int]], slots_BQ: np.ndarray, end: int
) -> np.ndarray:
    """[B, Q, S] bool: a committed entry sees those before it, an uncommitted one the context and its ancestors, each
    itself; a padding query sees only itself."""
    slots_S = np.arange(end)
    seen_BQS = slots_BQ[:, :, None] == slots_S
    for b, (row, wanted) in enumerate(zip(rows, chosen)):
        context_S = slots_S[: row.length]
        seen_BQS[b, : len(wanted), : row.length] = context_S <= slots_BQ[b, : len(wanted), None]
        behind = [(query, at - row.length) for query, at in enumerate(wanted) if at >= row.length]
        if behind:
            shown = min(len(row.positions), end - row.length)
            bits_QF = _bits([row.visible[entry] for _, entry in behind], len(row.positions))[:, :shown]
            seen_BQS[b, [query for query, _ in behind], row.length : row.length + shown] = bits_QF
    return seen_BQS


def _bits(masks: list[int], uncommitted: int) -> np.ndarray:
    """[Q, F] bool from bit masks, lowest bit first."""
    size = (uncommitted + 7) // 8
    raw = np.frombuffer(b"".join(mask.to_bytes(size, "little") for mask in masks), dtype=np.uint8)
    return np.unpackbits(raw.reshape(len(masks), size), axis=1, bitorder="little")[:, :uncommitted].view(bool)


def _near(rows: Sequence[RowState], counts: list[int], positions_BQ: np.ndarray, window: int, end: int) -> np.ndarray:
    """[B, Q, S] bool: less than `window` positions away. A committed slot's position is its index."""
    near_BQS = np.ones((len(rows), positions_BQ.shape[1], end), dtype=bool)
    for b, (row, count) in enumerate(zip(rows, counts)):
        positions_S = np.arange(end)
        uncommitted = row.positions[: max(end - row.length, 0)]
        positions_S[row.length : row.length + len(uncommitted)] = uncommitted
        near_BQS[b, :count] = positions_BQ[b, :count, None] - positions_S[None] < window
    return near_BQS
