"""Lightning's Trainer as our runs use it: strategies, ranks, loggers, and the whole weights at the end.

What is trained is not known here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning
import torch

from draftsmith.infer.models.layers import stack_path
from draftsmith.train.run.state_file import StateFile

if TYPE_CHECKING:
    from draftsmith.train.run.callbacks import AtSteps
    from draftsmith.train.run.config import TrainConfig
    from draftsmith.train.run.module import Training
    from draftsmith.train.run.run_record import RunRecord


def make_trainer(
    plan: TrainConfig, module: Training, watcher: AtSteps, record: RunRecord, max_steps: int
) -> lightning.Trainer:
    """A trainer whose epochs never end: max_steps does."""
    sharded = plan.strategy.startswith(("fsdp", "deepspeed"))
    each = plan.optim.batch_size // plan.world
    return lightning.Trainer(
        accelerator=plan.machine.device,
        devices=plan.devices,
        num_nodes=plan.num_nodes,
        strategy=_strategy(plan, module),
        precision=plan.machine.precision,
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=each // plan.optim.micro_batch_size,
        gradient_clip_val=plan.optim.grad_clip or None,
        callbacks=[watcher],
        plugins=None if sharded else [StateFile()],
        logger=_loggers(plan, record),
        default_root_dir=record.path,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _strategy(plan: TrainConfig, module: Training) -> Any:
    if plan.strategy == "fsdp":
        from lightning.pytorch.strategies import FSDPStrategy

        model = module.draft.model
        layer = type(model.get_submodule(stack_path(model))[0])
        return FSDPStrategy(auto_wrap_policy={layer}, state_dict_type="full", use_orig_params=True)
    if plan.strategy == "ddp":
        from lightning.pytorch.strategies import DDPStrategy

        return DDPStrategy(process_group_backend=None if plan.machine.device == "cuda" else "gloo")
    return plan.strategy


def _loggers(plan: TrainConfig, record: RunRecord) -> Any:
    made: list[Any] = []
    for name in plan.watch.loggers:
        if name == "tensorboard":
            from lightning.pytorch.loggers import TensorBoardLogger

            made.append(TensorBoardLogger(record.path, name="tensorboard", version=""))
        else:
            from lightning.pytorch.loggers import WandbLogger

            made.append(WandbLogger(project="draftsmith", name=record.path.name, save_dir=record.path))
    return made or False


def final_state(trainer: lightning.Trainer, module: Training, record: RunRecord) -> dict[str, torch.Tensor] | None:
    """The draft's whole weights under its own names, on the first rank; None where the module itself holds them."""
    name = type(trainer.strategy).__name__
    prefix = "draft.model."
    if name == "FSDPStrategy":
        state = trainer.strategy.lightning_module_state_dict()
    elif name == "DeepSpeedStrategy":
        from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict

        folder, whole = record.path / "resume" / "final", record.path / "resume" / "final.pt"
        trainer.save_checkpoint(folder)
        if trainer.is_global_zero:
            convert_zero_checkpoint_to_fp32_state_dict(str(folder), str(whole))
            state = torch.load(whole, map_location="cpu", weights_only=True)["state_dict"]
        trainer.strategy.barrier()
    else:
        module.cpu()
        return None
    if not trainer.is_global_zero:
        return None
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
