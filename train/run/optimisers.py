"""Optimisers by name, and the learning rate of every step as a function of the step alone.

Muon, for the matrices inside the layers: momentum whose update is orthogonalised; AdamW for all the rest. Method of
Keller Jordan (2024), with the update scaled to AdamW's RMS (arXiv 2502.16982), so that one learning rate serves both.
torch.optim.Muon takes only matrices and Lightning only one optimiser; hence an optimiser for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from draftsmith.train.run.sharding import part_like, whole_tensor

# A run limited by time does not know its length during its first, measured steps; their warm-up has this length.
PROVISIONAL_WARMUP = 100
# DeepSpeed's AdamW on the processor, for states in the machine's memory.
CPU_ADAMW = "cpu_adamw"
# Coefficients of the quintic iteration, chosen for its slope at zero; it does not converge to exactly one.
STEEP = (3.4445, -4.7750, 2.0315)


@dataclass(slots=True)
class LearningRateSchedule:
    """Linear warm-up over a share of `max_steps`, then a cosine to `floor` times the peak.

    The first `measured` steps do not depend on max_steps, which can be fixed after them.
    """

    peak: float
    max_steps: int
    warmup: float = 0.04
    floor: float = 0.0
    measured: int = 0

    def lr(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        if step < self.measured:
            return self.peak * (step + 1) / PROVISIONAL_WARMUP
        warm = math.ceil(self.warmup * self.max_steps)
        if step < warm:
            return self.peak * (step + 1) / warm
        done = min((step - warm) / max(self.max_steps - warm, 1), 1.0)
        return self.peak * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimiser(
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    name: str,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    outside: frozenset[str],
) -> torch.optim.Optimizer:
    """`adamw` (fused) or `muon` over the trainable weights, with weight decay on matrices only. `outside`: the names of
    embeddings and head, which Muon leaves to AdamW."""
    matrices: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    embedded: list[torch.nn.Parameter] = []
    for own, weight in parameters:
        if not weight.requires_grad:
            continue
        (embedded if own in outside else matrices if weight.ndim == 2 else vectors).append(weight)
    if not matrices + vectors + embedded:
        raise ValueError("there is nothing to train: every weight is frozen")
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "matrices": True},
        {"params": embedded, "weight_decay": weight_decay, "matrices": False},
        {"params": vectors, "weight_decay": 0.0, "matrices": False},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "muon":
        return Muon(groups, lr=lr, weight_decay=weight_decay, betas=betas)
    plain = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]
    if name == "adamw":
        return torch.optim.AdamW(plain, lr=lr, betas=betas, fused=True)
    if name == CPU_ADAMW:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimiser: torch.optim.Optimizer = DeepSpeedCPUAdam(plain, lr=lr, betas=betas, adamw_mode=True)
        return optimiser
    raise ValueError(f"unknown optimiser {name!r}: adamw or muon")


class Muon(torch.optim.Optimizer):
    """`groups` with `matrices: True` hold two-dimensional weights."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__(groups, {**defaults, "matrices": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    update = self._orthogonal if group["matrices"] else self._adam
                    weight.add_(update(weight, group), alpha=-group["lr"])
        return loss

    def _orthogonal(self, weight: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        state = self.state[weight]
        assert weight.grad is not None
        momentum = state.setdefault("momentum", torch.zeros_like(weight))
        momentum.lerp_(weight.grad, 1 - group["momentum"])
        ahead = weight.grad.lerp(momentum, group["momentum"])
        update = orthogonalised(whole_tensor(ahead)) * (0.2 * max(weight.shape) ** 0.5)
        return part_like(weight, update)

    def _adam(self, weight: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        state = self.state[weight]
        assert weight.grad is not None
        first = state.setdefault("first", torch.zeros_like(weight))
        second = state.setdefault("second", torch.zeros_like(weight))
        state["steps"] = state.get("steps", 0) + 1
        low, high = group["betas"]
        first.lerp_(weight.grad, 1 - low)
        second.lerp_(weight.grad.square(), 1 - high)
        spread = (second / (1 - high ** state["steps"])).sqrt_().add_(group["eps"])
        return first / (1 - low ** state["steps"]) / spread


def orthogonalised(matrix: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """Approximately U V^T of `matrix` = U S V^T; the singular values end between about 0.7 and 1.2."""
    exact = torch.promote_types(matrix.dtype, torch.float32)
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).to(exact)
    x = x / x.norm().clamp_min(1e-12)
    a, b, c = STEEP
    for _ in range(rounds):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.T).to(matrix.dtype)
