"""The LightningModule of every objective: loss = token sum / loss tokens of the whole optimiser step.

A batch knows the loss tokens of its step over all ranks and micro-batches (batches.py), so the gradient is that of the
mean over the step's tokens, however they are packed, accumulated and distributed.

Legend: E exits, heads or unrolls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning
import torch

from draftsmith.train.data.batches import IGNORED
from draftsmith.train.drafts.trainable import Trainable
from draftsmith.train.objectives.objective import Losses, LossSums
from draftsmith.train.run.optimisers import LearningRateSchedule, make_optimiser
from draftsmith.train.run.sharding import whole_tensor
from draftsmith.train.run.stops import diverged


class Training(lightning.LightningModule):
    """Trains `draft` by `objective`; the losses of a step's micro-batches are collected until `take_sums`.

    `shard` splits it over the ranks, once these have met.
    """

    def __init__(
        self,
        draft: Trainable,
        objective: Losses,
        schedule: LearningRateSchedule,
        *,
        optimiser: str = "adamw",
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        seed: int = 0,
        shard: Callable[[Training], None] | None = None,
    ) -> None:
        super().__init__()
        self.draft = draft
        self.objective = objective
        self.schedule = schedule
        self.optimiser = optimiser
        self.weight_decay = weight_decay
        self.betas = betas
        self.seed = seed
        self._shard = shard
        self.grad_norm = float("nan")
        self._sums: list[torch.Tensor] = []
        self._counts: list[torch.Tensor | None] = []
        self._loss_tokens: torch.Tensor
        self._losses_E: torch.Tensor

    def configure_model(self) -> None:
        if self._shard is not None:
            self._shard(self)
            self._shard = None

    def forward(self, batch: dict[str, torch.Tensor]) -> LossSums:
        return self.objective(self.draft, batch)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        # Seeded per micro-batch, so that a resumed run draws the same. What must not depend on the number of ranks
        # draws by row instead (row_streams.py).
        torch.manual_seed((self.seed << 32) + (int(batch["number"]) << 12) + self.global_rank)
        sums = self(batch)
        self._sums.append(sums.per_exit_E.detach())
        self._counts.append(sums.counts_E)
        self._loss_tokens = batch["loss_tokens"]
        # Lightning averages over ranks and micro-batches; undo both, because the sum is already divided.
        trainer = self.trainer
        return sums.total / batch["loss_tokens"] * (trainer.world_size * trainer.accumulate_grad_batches)

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> tuple[LossSums, torch.Tensor]:
        sums = self(batch)
        learned = int((batch["labels"] != IGNORED).sum())
        return sums, torch.full_like(sums.per_exit_E, learned) if sums.counts_E is None else sums.counts_E

    def take_sums(self) -> torch.Tensor:
        """[E] the last step's mean losses, over all ranks."""
        self._sums.clear()
        self._counts.clear()
        return self._losses_E

    def configure_optimizers(self) -> torch.optim.Optimizer:
        edges = {id(weight) for weight in self.draft.edges()}
        named = list(self.draft.named_parameters())
        outside = frozenset(name for name, weight in named if id(weight) in edges)
        lr = self.schedule.peak
        return make_optimiser(named, self.optimiser, lr, self.weight_decay, self.betas, outside)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        sums_E = reduced(self, torch.stack(self._sums).sum(0))
        counts = [counts_E for counts_E in self._counts if counts_E is not None]
        divisor = reduced(self, torch.stack(counts).sum(0).to(sums_E)).clamp_min(1) if counts else self._loss_tokens
        self._losses_E = sums_E / divisor
        if not self._losses_E.isfinite().all():
            losses = ", ".join(f"{loss:.3g}" for loss in self._losses_E.tolist())
            raise diverged(self.trainer.global_step + 1, f"the loss is {losses}")
        for group in optimizer.param_groups:
            group["lr"] = self.schedule.lr(self.trainer.global_step)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by the norm over all ranks; the unclipped norm is logged, and must be finite."""
        limit = gradient_clip_val or float("inf")
        trained = list(self.draft.parameters())
        grads = [weight.grad for weight in trained if weight.grad is not None]
        norm = whole_tensor(torch.nn.utils.get_total_norm(grads))
        torch.nn.utils.clip_grads_with_norm_(trained, limit, norm)
        self.grad_norm = float(norm)
        if not math.isfinite(self.grad_norm):
            raise diverged(self.trainer.global_step + 1, f"the gradient's norm is {self.grad_norm}")


def reduced(module: lightning.LightningModule, value: torch.Tensor) -> torch.Tensor:
    """The sum of `value` over all ranks."""
    trainer = module.trainer
    if trainer.world_size == 1:
        return value
    total = trainer.strategy.reduce(value.clone(), reduce_op="sum")
    assert isinstance(total, torch.Tensor)
    return total
