"""What to train and how long: all options of a run, and what the automatic ones come to on this machine.

What cannot go together is refused here, before anything is read or written. How a run is done is not known (run.py).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from draftsmith.train.run.settings import Machine, Optim, Text, Watch

STRATEGIES = ("auto", "ddp", "fsdp", "deepspeed_stage_2", "deepspeed_stage_3")
# The extra that brings each logger's package, which has the logger's name.
LOGGERS = {"tensorboard": "train", "wandb": "wandb"}


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """What to train and how long. Of `minutes`, `max_steps` and `epochs` the first that is given counts."""

    target: str
    data: list[str]
    out: str
    num_layers: int
    init: str = "first"
    shape: dict[str, int] | None = None
    freeze: Sequence[str] = ()
    lora_rank: int = 0
    epochs: float = 3.0
    max_steps: int | None = None
    minutes: float | None = None
    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"
    seed: int = 0
    text: Text = Text()
    optim: Optim = Optim()
    machine: Machine = Machine()
    watch: Watch = Watch()

    @property
    def world(self) -> int:
        return self.devices * self.num_nodes


def resolved(plan: TrainConfig) -> TrainConfig:
    """`plan` with what its automatic options come to on this machine."""
    if plan.strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {plan.strategy!r}: {', '.join(STRATEGIES)}")
    cuda = torch.cuda.is_available() if plan.machine.device == "auto" else plan.machine.device == "cuda"
    if plan.machine.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: this machine has no CUDA device")
    if plan.strategy.startswith(("fsdp", "deepspeed")):
        _check_sharded(plan, cuda)
    _check_loggers(plan.watch.loggers)
    precision = "bf16-mixed" if plan.machine.precision == "auto" else plan.machine.precision
    return replace(
        plan,
        strategy=plan.strategy if plan.strategy != "auto" or plan.world == 1 else "ddp",
        optim=replace(plan.optim, micro_batch_size=_micro_batch_size(plan)),
        machine=replace(plan.machine, device="cuda" if cuda else "cpu", precision=precision),
    )


def _check_sharded(plan: TrainConfig, cuda: bool) -> None:
    if not cuda:
        raise ValueError(f"strategy {plan.strategy} needs CUDA devices; on a CPU there is ddp")
    if plan.optim.name == "muon":
        raise ValueError(f"muon needs whole matrices, and {plan.strategy} cuts them up: use adamw, or ddp")
    if plan.watch.val_prompts:
        raise ValueError(
            f"accepted_length is measured with the whole draft, and {plan.strategy} cuts it up: set "
            "--watch.val_prompts 0 (the loss is still measured), and bench the checkpoint afterwards"
        )


def _check_loggers(loggers: Sequence[str]) -> None:
    for name in loggers:
        if name not in LOGGERS:
            raise ValueError(f"unknown logger {name!r}: tensorboard or wandb (metrics.csv is always written)")
        if importlib.util.find_spec(name) is None:
            extra = LOGGERS[name]
            raise ValueError(f"the logger {name} needs the extra `{extra}`: pip install 'draftsmith[{extra}]'")


def _micro_batch_size(plan: TrainConfig) -> int:
    if plan.optim.batch_size % plan.world:
        raise ValueError(f"batch_size {plan.optim.batch_size} does not divide by {plan.world} devices")
    each = plan.optim.batch_size // plan.world
    micro = plan.optim.micro_batch_size or next(size for size in (4, 3, 2, 1) if each % size == 0)
    if each % micro:
        raise ValueError(f"micro_batch_size {micro} does not divide the {each} rows of a device (batch_size / devices)")
    return micro
