"""Losses of several exits through one output head, or of heads each through its own, chunk by chunk, so that the logits
of all positions never coexist.

Each chunk's logits are computed, turned into their own gradient, multiplied back onto states and head, and freed. The
forward pass thus already holds the gradients (they are linear in the loss's gradient), and nothing of size positions x
vocabulary is kept or recomputed. All exits share one call, because the head's gradient is as large as the head and is
allocated once, and because the target's distribution of a chunk is computed once for all of them. Reductions run in at
least float32.

Legend: E exits or heads, N positions, D hidden, V vocabulary, C positions of a chunk.
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
    head: nn.Linear | Sequence[nn.Linear],
    weights: Sequence[float],
    loss: Loss | Sequence[Loss],
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    chunk_entries: int = 0,
) -> LossSums:
    """The same for any loss of a chunk's logits; for each chunk, `loss` is called once per exit, in order. One head and
    one loss serve all exits, or each has its own."""
    device = states_END[0].device.type
    heads = [head] if isinstance(head, nn.Linear) else list(head)
    losses = list(loss) if isinstance(loss, Sequence) else [loss] * len(states_END)
    assert len(heads) in (1, len(states_END))
    assert len(losses) == len(states_END)
    entries = chunk_entries or (CHUNK_ENTRIES_CUDA if device == "cuda" else CHUNK_ENTRIES)
    size = max(entries // max(each.out_features for each in heads), 1)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else heads[0].weight.dtype
    settings = (scale, softcap, size, dtype)
    tensors = [tensor for each in heads for tensor in (each.weight, each.bias)]
    return LossSums(*_Chunked.apply(tuple(weights), settings, losses, len(heads), *tensors, *states_END))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weights: tuple[float, ...],
        settings: tuple[float, float, int, torch.dtype],
        losses: Sequence[Loss],
        count: int,
        *tensors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`tensors`: weight and bias of `count` heads, then the states of each exit."""
        states_END: list[torch.Tensor] = tensors[2 * count :]  # type: ignore[assignment]
        scale, softcap, size, dtype = settings
        needed = ctx.needs_input_grad[4:]
        device = states_END[0].device
        with torch.autocast(device.type, enabled=False):
            places = range(0, 2 * count, 2)
            heads = [_Head(tensors[i], tensors[i + 1], dtype, needed[i], needed[i + 1]) for i in places]
            exact = heads[0].exact
            grad_END = [torch.empty_like(states_ND) for states_ND in states_END] if any(needed[2 * count :]) else None
            sums_E = torch.zeros(len(states_END), dtype=exact, device=device)
            for start in range(0, len(states_END[0]), size):
                chunk = slice(start, start + size)
                for e, states_ND in enumerate(states_END):
                    head = heads[e if count > 1 else 0]
                    states_CD = states_ND[chunk].to(dtype)
                    logits_CV = head.logits(states_CD)
                    summed, slope_CV = _shaped(losses[e], logits_CV, chunk, scale, softcap, any(needed))
                    sums_E[e] += summed
                    if slope_CV is None:
                        continue
                    if weights[e] != 1.0:
                        slope_CV *= weights[e]
                    narrow_CV = head.narrow(slope_CV)
                    del logits_CV, slope_CV
                    if grad_END is not None:
                        grad_END[e][chunk] = narrow_CV @ head.used_VD
                    if head.grad_VD is not None:
                        _add_product(head.grad_VD, narrow_CV, states_CD)
        ctx.heads = [(head.grad_VD, head.grad_V, head.dtypes) for head in heads]
        ctx.states = grad_END
        ctx.count = len(states_END)
        ctx.mark_non_differentiable(sums_E)
        total = (sums_E * torch.tensor(weights, dtype=exact, device=device)).sum()
        return total, sums_E

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        heads, grad_END = ctx.heads, ctx.states
        ctx.heads = ctx.states = None  # scaled in place below, so a second backward must not reuse them
        by = grads[0]
        found: list[torch.Tensor | None] = []
        for grad_VD, grad_V, (weight_dtype, bias_dtype) in heads:
            found.append(None if grad_VD is None else grad_VD.mul_(by).to(weight_dtype))
            found.append(None if grad_V is None else grad_V.mul_(by).to(bias_dtype))
        states = [None] * ctx.count if grad_END is None else [grad.mul_(by) for grad in grad_END]
        return None, None, None, None, *found, *states


class _Head:
    """An output head in the dtype of the products, and its gradients, as far as they are wanted."""

    def __init__(
        self, weight_VD: Any, bias_V: torch.Tensor | None, dtype: torch.dtype, learns: bool, bias_learns: bool
    ) -> None:
        self.exact = torch.promote_types(weight_VD.dtype, torch.float32)
        self.dtypes = (weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        self.used_VD = weight_VD.to(dtype)
        self.bias_V = None if bias_V is None else bias_V.to(self.exact)
        self.grad_VD = torch.zeros_like(weight_VD, dtype=self.exact) if learns else None
        self.grad_V = torch.zeros_like(bias_V, dtype=self.exact) if bias_V is not None and bias_learns else None

    def logits(self, states_CD: torch.Tensor) -> torch.Tensor:
        logits_CV = (states_CD @ self.used_VD.T).to(self.exact)
        if self.bias_V is not None:
            logits_CV += self.bias_V
        return logits_CV

    def narrow(self, slope_CV: torch.Tensor) -> torch.Tensor:
        """A chunk's slope in the dtype of the products, once the bias has its gradient."""
        if self.grad_V is not None:
            self.grad_V += slope_CV.sum(0)
        return slope_CV.to(self.used_VD.dtype)


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
