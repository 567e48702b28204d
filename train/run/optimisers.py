"""Optimisers by name, and the learning rate of every step as a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from draftsmith.train.run.muon import Muon

# A run limited by time does not know its length during its first, measured steps; their warm-up has this length.
PROVISIONAL_WARMUP = 100


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
    if name == "adamw":
        plain = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]
        return torch.optim.AdamW(plain, lr=lr, betas=betas, fused=True)
    raise ValueError(f"unknown optimiser {name!r}: adamw or muon")
