"""Muon: momentum whose update is orthogonalised, for the matrices inside the layers; AdamW for all the rest.

Method of Keller Jordan (2024), with the update scaled to AdamW's RMS (arXiv 2502.16982), so that one learning rate
serves both. torch.optim.Muon takes only matrices and Lightning only one optimiser; hence this optimiser for both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Coefficients of the quintic iteration, chosen for its slope at zero; it does not converge to exactly one.
STEEP = (3.4445, -4.7750, 2.0315)


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
        return orthogonalised(ahead) * (0.2 * max(weight.shape) ** 0.5)

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
