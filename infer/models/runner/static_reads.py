"""Attention of a pass whose shapes do not depend on what it reads, so that it can be captured.

Who sees which slot is worked out on the device, from a few numbers per row: the *spans* of slots that its rows hold,
and each token's ancestors as bits. Keys and values are read where they lie, all slots up to a power of two at once, in
splits that are merged by their log-sum-exp: without splits a long context would be read by one block per head.

So every token is multiplied with the slots of all rows, and what it does not see gets weight 0. Memory is read once for
all rows together, which is what a pass of few tokens waits for; a pass of many tokens had better be run row by row.

Legend: N tokens, R query heads of a key/value head, G key/value heads, L slots that are read, P splits, K = L / P,
S spans, W words of 64 bits, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from draftsmith.infer.models.runner.attention import Shaping, attend_piece, kind_of, merged, sinks_part
from draftsmith.infer.models.runner.masks import RowSlots
from draftsmith.infer.models.runner.pass_inputs import ChosenEntries
from draftsmith.infer.models.runner.transfers import Numbers

# Uncommitted entries of a row, at most: 64 for each word.
WORDS = 2
# Rows of a pass, at most: one bit each.
ROWS = 64
# Slots of one split. Not measured on a GPU yet.
SPLIT = 512
# What hides a slot: so low that its weight is 0, and far enough from the lowest number to be added to and scaled.
HIDDEN = -1e30
NOWHERE = 1 << 62


@dataclass(frozen=True, slots=True)
class StaticShape:
    """Of a pass: its tokens with padding, and the number of slots from 0 on that it reads."""

    tokens: int
    slots: int

    @property
    def spans(self) -> int:
        """Of all rows, at most, with the one for padding."""
        return 2 * self.tokens + 1


@dataclass(slots=True)
class StaticInputs:
    """Views of the buffer that one upload fills: what the model takes, and what tells who sees what."""

    tokens_N: torch.Tensor
    positions_N: torch.Tensor
    slots_N: torch.Tensor
    keep_N: torch.Tensor
    rows_N: torch.Tensor
    spans_5S: torch.Tensor
    ancestors_N: torch.Tensor

    @staticmethod
    def size(shape: StaticShape, windows: int) -> int:
        return (5 + windows * WORDS) * shape.tokens + 5 * shape.spans

    @classmethod
    def of(cls, buffer: torch.Tensor, shape: StaticShape, windows: int) -> StaticInputs:
        count = shape.tokens
        tokens, positions, slots, keep, rows = buffer[: 5 * count].view(5, count).unbind()
        end = 5 * count + 5 * shape.spans
        spans_5S = buffer[5 * count : end].view(5, shape.spans)
        return cls(tokens, positions, slots, keep, rows, spans_5S, buffer[end:].view(windows, count, WORDS))


def static_parts(
    entries: ChosenEntries, keep: Sequence[int], shape: StaticShape, windows: Sequence[int | None]
) -> list[Numbers] | None:
    """What fills the buffer of StaticInputs, in its order; None if these entries do not fit it."""
    spans = _spans(entries)
    uncommitted = max(len(place.positions) for place in entries.places)
    committed = any(some and some[0] < place.length for place, some in zip(entries.places, entries.chosen))
    if len(spans) >= shape.spans or uncommitted > 64 * WORDS or len(entries.rows) > ROWS or committed:
        return None
    rows = [b for b, some in enumerate(entries.chosen) for _ in some]
    spare = [0] * (shape.tokens - len(rows))
    spans_S5 = [[0, 0, 0, 0, 0], *spans] + [[NOWHERE, 0, 0, 0, 0]] * (shape.spans - len(spans) - 1)
    ancestors = b"".join(_bits(entries, window, len(spare)) for window in windows)
    return [
        entries.tokens + spare,
        entries.positions + spare,
        entries.slots + spare,
        [*keep, *[0] * (shape.tokens - len(keep))],
        rows + [-1] * len(spare),
        np.array(spans_S5, dtype=np.int64).T.ravel(),
        np.frombuffer(ancestors, dtype=np.int64),
    ]


def last_slot(entries: ChosenEntries) -> int:
    """The number of slots, from 0 on, that hold all that these entries see."""
    return max(start + count + pending for start, count, _, pending, _ in _spans(entries))


def _spans(entries: ChosenEntries) -> list[list[int]]:
    """Runs of slots by first slot: [first slot, committed tokens in it, position of the first of them, uncommitted
    entries behind them, rows that read it as bits]. A shared run has several readers."""
    found: dict[int, list[int]] = {}
    for b, place in enumerate(entries.places):
        at, last = 0, len(place.spans) - 1
        for i, (start, count) in enumerate(place.spans):
            pending = len(place.positions) if i == last else 0
            span = found.setdefault(start, [start, count, at, pending, 0])
            assert span[:4] == [start, count, at, pending], "rows disagree about what they share"
            span[4] |= 1 << b
            at += count
    for span in found.values():
        span[4] = _signed(span[4])
    return [found[start] for start in sorted(found)]


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits


def _bits(entries: ChosenEntries, window: int | None, spare: int) -> bytes:
    """Each token's ancestors within the window, itself included, as WORDS words."""
    seen = []
    for place, some in zip(entries.places, entries.chosen):
        for entry in some:
            seen.append(_near(place, entry - place.length, window).to_bytes(8 * WORDS, "little"))
    return b"".join([*seen, bytes(8 * WORDS * spare)])


def _near(place: RowSlots, entry: int, window: int | None) -> int:
    bits = place.visible[entry]
    if window is None or place.positions[entry] - place.length < window:
        return bits
    far = (i for i, at in enumerate(place.positions) if place.positions[entry] - at >= window)
    return bits & ~sum(1 << i for i in far)


class StaticReads:
    """What the tokens of a static pass read, worked out from `inputs` where it is first asked for."""

    def __init__(
        self,
        inputs: StaticInputs,
        shape: StaticShape,
        windows: Mapping[str, int | None],
        marks: Mapping[str, torch.Tensor],
    ) -> None:
        self.inputs = inputs
        self.shape = shape
        self.windows = windows
        self.marks = marks
        self._seen_NL = dict(zip(dict.fromkeys(windows.values()), self._seen()))
        self._masks: dict[tuple[int | None, int, torch.dtype], torch.Tensor] = {}

    def attend(
        self,
        query_1HND: torch.Tensor,
        key_1GSD: torch.Tensor,
        value_1GSD: torch.Tensor,
        mark: torch.Tensor | None,
        shaping: Shaping,
    ) -> torch.Tensor:
        _, heads, count, size = query_1HND.shape
        groups = key_1GSD.shape[1]
        repeats = heads // groups
        mask_QL = self._mask(self.windows[kind_of(self.marks, mark)], repeats, query_1HND.dtype)
        folded_GQD = query_1HND[0].reshape(groups, repeats * count, size)
        keys_GLD = key_1GSD[0, :, : self.shape.slots]
        values_GLD = value_1GSD[0, :, : self.shape.slots]
        if shaping.softcap is None and fused(folded_GQD, values_GLD):
            parts = _in_splits(folded_GQD, keys_GLD, values_GLD, mask_QL, shaping.scale)
        else:
            parts = [attend_piece(folded_GQD, keys_GLD, values_GLD, mask_QL, shaping)]
        if shaping.sinks_GR is not None:
            parts.append(sinks_part(shaping.sinks_GR, parts[0], count))
        out_GRND = merged(parts).view(groups, repeats, count, -1)
        return out_GRND.permute(2, 0, 1, 3).reshape(1, count, heads, -1)

    def _mask(self, window: int | None, repeats: int, dtype: torch.dtype) -> torch.Tensor:
        """[R * N, L] additive, for folded heads. Made once and used by every layer."""
        key = window, repeats, dtype
        if key not in self._masks:
            seen_NL = self._seen_NL[window]
            low = max(HIDDEN, torch.finfo(dtype).min)
            mask_NL = torch.zeros(seen_NL.shape, dtype=dtype, device=seen_NL.device).masked_fill_(~seen_NL, low)
            self._masks[key] = mask_NL.repeat(repeats, 1)
        return self._masks[key]

    def _seen(self) -> list[torch.Tensor]:
        """[N, L] bool for each window: the committed tokens of a token's own row, and its ancestors. Padding sees
        nothing, so all slots get the same weight: its numbers are finite, and nobody reads them."""
        starts_S, counts_S, positions_S, pending_S, readers_S = self.inputs.spans_5S
        rows_N1 = self.inputs.rows_N[:, None]
        slots_L = torch.arange(self.shape.slots, device=starts_S.device)
        span_L = torch.searchsorted(starts_S, slots_L, right=True) - 1
        rank_L = slots_L - starts_S[span_L]
        committed_L = rank_L < counts_S[span_L]
        distance_NL = self.inputs.positions_N[:, None] - (positions_S[span_L] + rank_L)
        behind_L = rank_L - counts_S[span_L]
        pending_L = (behind_L >= 0) & (behind_L < pending_S[span_L])
        bit_L = behind_L.clamp(0, 64 * WORDS - 1)
        own_NL = (readers_S[span_L] >> rows_N1.clamp_min(0)) & 1 == 1
        own_NL &= rows_N1 >= 0
        found = []
        for window, words_NW in zip(dict.fromkeys(self.windows.values()), self.inputs.ancestors_N):
            near_NL = committed_L if window is None else committed_L & (distance_NL < window)
            ancestor_NL = (words_NW[:, bit_L // 64] >> (bit_L % 64)) & 1 == 1
            found.append(own_NL & (near_NL | pending_L & ancestor_NL))
        return found


def fused(query_GQD: torch.Tensor, values_GKD: torch.Tensor) -> bool:
    """Whether one call computes attention and its log-sum-exp here."""
    same = query_GQD.shape[-1] == values_GKD.shape[-1]
    return same and (query_GQD.device.type == "cpu" or query_GQD.dtype != torch.float64)


def _in_splits(
    query_GQD: torch.Tensor, keys_GLD: torch.Tensor, values_GLD: torch.Tensor, mask_QL: torch.Tensor, scale: float
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The attention [G, Q, D] to each split of the slots, and the log-sum-exp of its scores [G, Q]."""
    groups, queries, size = query_GQD.shape
    splits = max(keys_GLD.shape[1] // SPLIT, 1)
    query_PGQD = query_GQD.expand(splits, groups, queries, size)
    keys_PGKD, values_PGKD = (whole.unflatten(1, (splits, -1)).transpose(0, 1) for whole in (keys_GLD, values_GLD))
    mask_PGQK = mask_QL.unflatten(1, (splits, -1)).transpose(0, 1)[:, None].expand(-1, groups, -1, -1)
    if query_GQD.device.type == "cpu":
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query_PGQD, keys_PGKD, values_PGKD, attn_mask=mask_PGQK[:, :1], scale=scale
        )
    else:
        out, log_sum, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query_PGQD, keys_PGKD, values_PGKD, mask_PGQK, True, scale=scale
        )
        log_sum = log_sum[:, :, :queries]  # the kernel pads it
    return list(zip(out, log_sum))
