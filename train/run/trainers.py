"""Lightning's Trainer as configured for our runs: strategies, loggers, checkpoint files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.fabric.plugins import CheckpointIO

from draftsmith.train.run.sharding import ShardedStrategy

if TYPE_CHECKING:
    from draftsmith.train.run.callbacks import AtSteps
    from draftsmith.train.run.config import RunConfig
    from draftsmith.train.run.run_record import RunRecord


class StateFile(CheckpointIO):
    """Writes checkpoints straight to their file (Lightning holds them twice); loads only tensors and plain values."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        with Path(path).open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> Any:
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def make_trainer(config: RunConfig, watcher: AtSteps, record: RunRecord, max_steps: int) -> lightning.Trainer:
    """A trainer that runs to max_steps, in one endless epoch."""
    each = config.optim.batch_size // config.world
    return lightning.Trainer(
        accelerator=config.machine.device,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=_strategy(config),
        precision=config.machine.precision,
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=each // config.optim.micro_batch_size,
        gradient_clip_val=config.optim.grad_clip or None,
        callbacks=[watcher],
        plugins=None if config.sharded else [StateFile()],
        logger=_loggers(config, record),
        default_root_dir=record.path,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _strategy(config: RunConfig) -> Any:
    if config.strategy.startswith("fsdp"):
        return ShardedStrategy(config.world, config.machine.device, config.offloads)
    if config.strategy == "ddp":
        from lightning.pytorch.strategies import DDPStrategy

        backend = None if config.machine.device == "cuda" else "gloo"
        # Else each rank holds its gradients twice.
        return DDPStrategy(process_group_backend=backend, gradient_as_bucket_view=True)
    return config.strategy


def _loggers(config: RunConfig, record: RunRecord) -> Any:
    made: list[Any] = []
    for name in config.watch.loggers:
        if name == "tensorboard":
            from lightning.pytorch.loggers import TensorBoardLogger

            made.append(TensorBoardLogger(record.path, name="tensorboard", version=""))
        else:
            from lightning.pytorch.loggers import WandbLogger

            made.append(WandbLogger(project="draftsmith", name=record.path.name, save_dir=record.path))
    return made or False
