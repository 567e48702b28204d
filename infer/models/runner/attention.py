"""Attention of a packed pass: the tokens of all rows lie behind one another, and each row reads its own slots.

Registered with transformers' AttentionInterface, so that a model's layers call it instead of their own. Keys and values
are read where they lie: the query heads of a group become more queries of one key/value head, so nothing is expanded or
copied. A row's context has no mask and its tree a small one; the parts are merged by their log-sum-exp.

Legend: N tokens of a pass, Q queries of a row, H query heads, G key/value heads, R = H / G, S slots, K slots of a
piece, D head size.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from draftsmith.infer.costs.remembered import choice_path, remember, remembered
from draftsmith.infer.models.runner.masks import SlotRun, additive

NAME = "draftsmith"
# Slots that the plain product of queries and keys is made for at once.
BLOCK = 2048
# 16-bit attention to one query is timed against two, this often.
HALVES, TRIES, CLEARLY_LESS = (torch.bfloat16, torch.float16), 15, 0.8

_passes: list[Reads] = []


class Reads(Protocol):
    """What the tokens of a pass read. `mark` is what a layer was given in place of a mask."""

    def attend(
        self,
        query_1HND: torch.Tensor,
        key_1GSD: torch.Tensor,
        value_1GSD: torch.Tensor,
        mark: torch.Tensor | None,
        shaping: Shaping,
    ) -> torch.Tensor:
        """[1, N, H, D]"""
        ...


@dataclass(slots=True)
class Shaping:
    """How scores become weights: their factor, a cap on them, and [G, R] sinks that take a share of the attention."""

    scale: float
    softcap: float | None = None
    sinks_GR: torch.Tensor | None = None


def kind_of(marks: Mapping[str, torch.Tensor], mark: torch.Tensor | None) -> str:
    """The kind of layer that was given this mark."""
    if len(marks) == 1:
        return next(iter(marks))
    for kind, own in marks.items():
        if own is mark:
            return kind
    raise ValueError("a layer did not hand its mask on, so its window is unknown")


@dataclass(slots=True)
class RowReads:
    """The queries `first` up to `end` of a pass, and what they see. `seen[i]` is piece i's mask on the device."""

    first: int
    end: int
    pieces: list[SlotRun]
    seen: dict[int, torch.Tensor] = field(default_factory=dict)
    _masks: dict[tuple[int, int, torch.dtype], torch.Tensor] = field(default_factory=dict)

    def mask(self, piece: int, repeats: int, dtype: torch.dtype) -> torch.Tensor | None:
        """[R * Q, K] additive, for queries whose heads are folded. Made once and used by every layer."""
        if piece not in self.seen:
            return None
        key = piece, repeats, dtype
        if key not in self._masks:
            self._masks[key] = additive(self.seen[piece], dtype).repeat(repeats, 1)
        return self._masks[key]


@dataclass(slots=True)
class PackedPass:
    """A pass whose rows are read one after the other. `marks` stand for the kinds where a model expects a mask."""

    reads: dict[str, list[RowReads]]
    marks: Mapping[str, torch.Tensor]

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
        outs = []
        for row in self.reads[kind_of(self.marks, mark)]:
            queries = row.end - row.first
            folded_GQD = query_1HND[0, :, row.first : row.end].reshape(groups, repeats * queries, size)
            parts = []
            for i, piece in enumerate(row.pieces):
                keys_GKD = key_1GSD[0, :, piece.start : piece.start + piece.count]
                values_GKD = value_1GSD[0, :, piece.start : piece.start + piece.count]
                mask = row.mask(i, repeats, query_1HND.dtype)
                parts.append(attend_piece(folded_GQD, keys_GKD, values_GKD, mask, shaping))
            if shaping.sinks_GR is not None:
                parts.append(sinks_part(shaping.sinks_GR, parts[0], queries))
            merged_GQD = merged(parts)
            folded_QGRD = merged_GQD.view(groups, repeats, queries, -1).permute(2, 0, 1, 3)
            outs.append(folded_QGRD.reshape(queries, heads, -1))
        padding = count - row.end
        if padding:
            outs.append(query_1HND.new_zeros((padding, heads, value_1GSD.shape[-1])))
        return (outs[0] if len(outs) == 1 else torch.cat(outs))[None]


@contextlib.contextmanager
def running(reads: Reads, configs: Sequence[Any]) -> Iterator[None]:
    """Let the models with these configs attend as `reads` says."""
    _register()
    before = [config._attn_implementation_internal for config in configs]
    _passes.append(reads)
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield
    finally:
        _passes.pop()
        for config, name in zip(configs, before):
            config._attn_implementation_internal = name


def configs_of(model: Any) -> list[Any]:
    """The configs by which the layers of `model` choose their attention, each once."""
    found = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return [config for config in found.values() if hasattr(config, "_attn_implementation_internal")]


def _register() -> None:
    from transformers import AttentionInterface

    if NAME not in AttentionInterface._global_mapping:
        AttentionInterface.register(NAME, packed_attention)


def packed_attention(
    module: Any,
    query_1HND: torch.Tensor,
    key_1GSD: torch.Tensor,
    value_1GSD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **ignored: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' layers call. `softcap` and the sinks `s_aux` are what some families add to attention."""
    for name in ("position_bias", "head_mask"):
        if ignored.get(name) is not None:
            raise ValueError(f"attention with {name} is not made for packed passes")
    groups = key_1GSD.shape[1]
    scale = query_1HND.shape[-1] ** -0.5 if scaling is None else float(scaling)
    shaping = Shaping(scale, softcap, None if s_aux is None else s_aux.reshape(groups, -1))
    return _passes[-1].attend(query_1HND, key_1GSD, value_1GSD, attention_mask, shaping), None


Part = tuple[torch.Tensor, torch.Tensor]


def attend_piece(
    query_GQD: torch.Tensor,
    keys_GKD: torch.Tensor,
    values_GKD: torch.Tensor,
    mask_QK: torch.Tensor | None,
    shaping: Shaping,
) -> Part:
    """The attention to one piece [G, Q, D], and the log-sum-exp of its scores [G, Q]."""
    if query_GQD.device.type == "cpu" and shaping.softcap is None and keys_GKD.shape[-1] == values_GKD.shape[-1]:
        if query_GQD.shape[1] == 1 and two_are_faster(query_GQD.dtype):
            mask_QK = None if mask_QK is None else mask_QK.repeat(2, 1)
            out, log_sum = _flash(query_GQD.repeat(1, 2, 1), keys_GKD, values_GKD, mask_QK, shaping)
            return out[:, :1], log_sum[:, :1]
        return _flash(query_GQD, keys_GKD, values_GKD, mask_QK, shaping)
    exact = torch.float64 if query_GQD.dtype == torch.float64 else torch.float32
    parts = []
    for start in range(0, keys_GKD.shape[1], BLOCK):
        keys, values = keys_GKD[:, start : start + BLOCK], values_GKD[:, start : start + BLOCK]
        scores_GQK = torch.matmul(query_GQD, keys.transpose(1, 2)).to(exact) * shaping.scale
        if shaping.softcap is not None:
            scores_GQK = shaping.softcap * torch.tanh(scores_GQK / shaping.softcap)
        if mask_QK is not None:
            scores_GQK = scores_GQK + mask_QK[:, start : start + BLOCK]
        log_sum_GQ = torch.logsumexp(scores_GQK, -1)
        weights_GQK = torch.exp(scores_GQK - log_sum_GQ[..., None]).to(values.dtype)
        parts.append((torch.matmul(weights_GQK, values), log_sum_GQ))
    return (merged(parts), torch.logsumexp(torch.stack([one for _, one in parts]), 0)) if parts[1:] else parts[0]


def _flash(
    query_GQD: torch.Tensor,
    keys_GKD: torch.Tensor,
    values_GKD: torch.Tensor,
    mask_QK: torch.Tensor | None,
    shaping: Shaping,
) -> Part:
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query_GQD[None],
        keys_GKD[None],
        values_GKD[None],
        attn_mask=None if mask_QK is None else mask_QK[None, None],
        scale=shaping.scale,
    )
    return out[0], log_sum[0]


@functools.cache
def two_are_faster(dtype: torch.dtype) -> bool:
    """Whether this machine attends for two 16-bit queries in clearly less time than for one (LOG.md has figures); timed
    once for a machine."""
    if dtype not in HALVES:
        return False
    path = choice_path("attention", str(dtype))
    known = remembered(path).get("two")
    if not isinstance(known, bool):
        one, two = (_seconds(queries, dtype) for queries in (1, 2))
        known = two < CLEARLY_LESS * one
        remember(path, {"two": known})
    return known


@torch.inference_mode()
def _seconds(queries: int, dtype: torch.dtype) -> float:
    """Of attention behind a short context."""
    query_GQD, keys_GKD = (torch.ones((8, count, 64), dtype=dtype) for count in (queries, 256))
    best = float("inf")
    for _ in range(TRIES):
        began = time.perf_counter()
        _flash(query_GQD, keys_GKD, keys_GKD, None, Shaping(1.0))
        best = min(best, time.perf_counter() - began)
    return best


def sinks_part(sinks_GR: torch.Tensor, like: Part, queries: int) -> Part:
    """A part that gives nothing and takes its share of the attention."""
    log_sum_GQ = sinks_GR.to(like[1].dtype).repeat_interleave(queries, 1)
    return torch.zeros_like(like[0]), log_sum_GQ


def merged(parts: Sequence[Part]) -> torch.Tensor:
    """[G, Q, D] the attention to all parts together."""
    if len(parts) == 1:
        return parts[0][0]
    shares_PGQ = torch.softmax(torch.stack([log_sum for _, log_sum in parts]), 0)
    out = sum(out * share[..., None] for (out, _), share in zip(parts, shares_PGQ))
    assert isinstance(out, torch.Tensor)
    return out.to(parts[0][0].dtype)


def dense_seen(rows: Sequence[RowReads], tokens: int, slots: int) -> np.ndarray:
    """[N, S] what each token sees, for layers that attend on their own; padding sees slot 0 only."""
    seen_NS = np.zeros((tokens, slots), dtype=bool)
    padding = np.ones(tokens, dtype=bool)
    for row in rows:
        padding[row.first : row.end] = False
        for piece in row.pieces:
            shown = True if piece.seen_QK is None else piece.seen_QK
            seen_NS[row.first : row.end, piece.start : piece.start + piece.count] = shown
    seen_NS[padding, 0] = True
    return seen_NS
