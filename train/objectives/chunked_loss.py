"""Losses of several exits through one output head, chunk by chunk, so that the logits of all positions never coexist.

Each chunk's logits are computed, turned into their own gradient, multiplied back onto states and head, and freed. The
forward pass thus already holds the gradients (they are linear in the loss's gradient), and nothing of size positions x
vocabulary is kept or recomputed. All exits share one call, because the head's gradient is as large as the head and is
allocated once, and because the target's distribution of a chunk is computed once for all of them. Reductions run in at
least float32.

Legend: E exits, N positions, D hidden, V vocabulary, C positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from draftsmith.train.objectives.objective import LossSums

# Entries of a chunk's logits: 64 MiB of float32 on a CPU; a GPU needs larger products.
CHUNK_ENTRIES = 1 << 24
CHUNK_ENTRIES_CUDA = 1 << 27

# (logits of a chunk, which may be overwritten; the chunk; whether a gradient is wanted) -> (loss summed over the chunk,
# its gradient with respect to those logits, or None). A gradient of a chunk is called `slope`.
Loss = Callable[[torch.Tensor, slice, bool], tuple[torch.Tensor, torch.Tensor | None]]


def chunked_cross_entropy(
    states_END: Sequence[torch.Tensor],
    head: nn.Linear,
    labels_N: torch.Tensor,
    weights: Sequence[float],
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    chunk_entries: int = 0,
) -> LossSums:
    """The weighted sum over exits, and their unweighted token sums without gradient, in at least float32.

    `states_END`: each exit's states after the final norm, at the positions that have a label.
    """

    def loss(logits_CV: torch.Tensor, chunk: slice, slope: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        return _cross_entropy(logits_CV, labels_N[chunk], slope)

    return chunked_loss(states_END, head, weights, loss, scale=scale, softcap=softcap, chunk_entries=chunk_entries)


def chunked_loss(
    states_END: Sequence[torch.Tensor],
    head: nn.Linear,
    weights: Sequence[float],
    loss: Loss,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    chunk_entries: int = 0,
) -> LossSums:
    """The same for any loss of a chunk's logits; for each chunk, `loss` is called once per exit, in order."""
    device = states_END[0].device.type
    entries = chunk_entries or (CHUNK_ENTRIES_CUDA if device == "cuda" else CHUNK_ENTRIES)
    size = max(entries // head.out_features, 1)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    settings = (scale, softcap, size, dtype)
    return LossSums(*_Chunked.apply(head.weight, head.bias, tuple(weights), settings, loss, *states_END))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        weights: tuple[float, ...],
        settings: tuple[float, float, int, torch.dtype],
        loss: Loss,
        *states_END: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scale, softcap, size, dtype = settings
        exact = torch.promote_types(weight_VD.dtype, torch.float32)
        needed = ctx.needs_input_grad
        device = states_END[0].device
        with torch.autocast(device.type, enabled=False):
            used_VD = weight_VD.to(dtype)
            grad_VD = torch.zeros_like(weight_VD, dtype=exact) if needed[0] else None
            grad_V = torch.zeros_like(bias_V, dtype=exact) if bias_V is not None and needed[1] else None
            grad_END = [torch.empty_like(states_ND) for states_ND in states_END] if any(needed[5:]) else None
            sums_E = torch.zeros(len(states_END), dtype=exact, device=device)
            for start in range(0, len(states_END[0]), size):
                chunk = slice(start, start + size)
                for e, states_ND in enumerate(states_END):
                    states_CD = states_ND[chunk].to(dtype)
                    logits_CV = (states_CD @ used_VD.T).to(exact)
                    if bias_V is not None:
                        logits_CV += bias_V.to(exact)
                    summed, slope_CV = _shaped(loss, logits_CV, chunk, scale, softcap, any(needed))
                    sums_E[e] += summed
                    if slope_CV is None:
                        continue
                    slope_CV *= weights[e]
                    if grad_V is not None:
                        grad_V += slope_CV.sum(0)
                    narrow_CV = slope_CV.to(dtype)
                    del logits_CV, slope_CV
                    if grad_END is not None:
                        grad_END[e][chunk] = narrow_CV @ used_VD
                    if grad_VD is not None:
                        _add_product(grad_VD, narrow_CV, states_CD)
        ctx.gradients = (grad_VD, grad_V, grad_END)
        ctx.dtypes = (weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        ctx.mark_non_differentiable(sums_E)
        total = (sums_E * torch.tensor(weights, dtype=exact, device=device)).sum()
        return total, sums_E

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        grad_VD, grad_V, grad_END = ctx.gradients
        ctx.gradients = None  # scaled in place below, so a second backward must not reuse them
        by = grads[0]
        weight_dtype, bias_dtype = ctx.dtypes
        head = None if grad_VD is None else grad_VD.mul_(by).to(weight_dtype)
        bias = None if grad_V is None else grad_V.mul_(by).to(bias_dtype)
        states = [None] * (len(ctx.needs_input_grad) - 5) if grad_END is None else [grad.mul_(by) for grad in grad_END]
        return head, bias, None, None, None, *states


def _add_product(grad_VD: torch.Tensor, slope_CV: torch.Tensor, states_CD: torch.Tensor) -> None:
    """grad += slope^T states, at once if the dtypes match, else in blocks of rows to avoid a full-size temporary."""
    if slope_CV.dtype == grad_VD.dtype:
        grad_VD.addmm_(slope_CV.T, states_CD)
        return
    rows = max(CHUNK_ENTRIES // grad_VD.shape[1], 1)
    for start in range(0, len(grad_VD), rows):
        grad_VD[start : start + rows] += slope_CV[:, start : start + rows].T @ states_CD


def _shaped(
    loss: Loss, logits_CV: torch.Tensor, chunk: slice, scale: float, softcap: float, slope: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The loss after scale and softcap, and its slope before them; overwrites `logits_CV`."""
    if scale != 1.0:
        logits_CV *= scale
    bend_CV = None
    if softcap:
        logits_CV = torch.tanh_(logits_CV.div_(softcap))
        bend_CV = 1 - logits_CV.square() if slope else None
        logits_CV *= softcap
    summed, slope_CV = loss(logits_CV, chunk, slope)
    if slope_CV is None:
        return summed, None
    if bend_CV is not None:
        slope_CV *= bend_CV
    if scale != 1.0:
        slope_CV *= scale
    return summed, slope_CV


def _cross_entropy(
    logits_CV: torch.Tensor, labels_C: torch.Tensor, slope: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    picked_C1 = labels_C[:, None]
    norm_C1 = torch.logsumexp(logits_CV, -1, keepdim=True)
    summed = (norm_C1 - logits_CV.gather(1, picked_C1)).sum()
    if not slope:
        return summed, None
    slope_CV = logits_CV.sub_(norm_C1).exp_()
    slope_CV.scatter_add_(1, picked_C1, torch.full_like(norm_C1, -1.0))
    return summed, slope_CV
