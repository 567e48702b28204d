"""The options of a training run, as YAML and flags give them (`--optim.lr 2e-5`), and their check before anything is
read or written. run.py unpacks them: no model, loss or loader sees one of these classes.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from operator import attrgetter
from typing import Any, Literal, TypeVar

from draftsmith.train.drafts.shapes import find_preset

# Of the sharded ones, Lightning's names for DeepSpeed's.
STRATEGIES = (
    "auto", "ddp", "fsdp", "fsdp_cpu_offload", "deepspeed_stage_2", "deepspeed_stage_2_offload", "deepspeed_stage_3",
    "deepspeed_stage_3_offload",
)  # fmt: skip
SHARDED = ("fsdp", "deepspeed")
# Logger (which is also its package's name) -> the extra that installs it.
LOGGERS = {"tensorboard": "train", "wandb": "wandb"}


@dataclass(frozen=True)
class Text:
    """The training text and how it is rendered.

    Args:
        template: auto (chat, or plain without one), chat (the tokenizer's own), plain, a format such as
            'USER: {prompt} ASSISTANT:', or the name of a FastChat template (vicuna_v1.1).
        template_kwargs: passed to the chat template (enable_thinking: false).
        system: system message for conversations without one.
        max_length: tokens of a packed row, and of the longest sequence.
        held_out: share of the conversations kept for validation.
        split_by: how they are chosen: conversation (a hash of its beginning) or time (the newest).
        limit: read at most this many records.
        cache: folder for tokenised data; default: the user's cache folder.
    """

    template: str = "auto"
    template_kwargs: dict[str, Any] | None = None
    system: str | None = None
    max_length: int = 2048
    held_out: float = 0.02
    split_by: Literal["conversation", "time"] = "conversation"
    limit: int | None = None
    cache: str | None = None


@dataclass(frozen=True)
class Optim:
    """Optimiser, learning rate and batch.

    Args:
        lr: peak learning rate.
        batch_size: packed rows per optimiser step, over all devices.
        micro_batch_size: packed rows per forward pass of a device; 0: the largest of 4, 3, 2, 1 that fits batch_size.
        name: adamw, or muon (Muon for the matrices inside the layers, AdamW for the rest).
        weight_decay: weight decay of matrices.
        beta1: AdamW's first beta.
        beta2: AdamW's second beta.
        warmup: share of the steps over which the learning rate rises.
        floor: final learning rate of the cosine, as a share of the peak.
        grad_clip: largest gradient norm; 0: no clipping.
    """

    lr: float = 2e-5
    batch_size: int = 128
    micro_batch_size: int = 0
    name: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    warmup: float = 0.04
    floor: float = 0.0
    grad_clip: float = 1.0


@dataclass(frozen=True)
class Machine:
    """Device, precision and memory.

    Args:
        device: auto, cpu or cuda.
        precision: bf16-mixed, bf16-true, 32-true or 64-true; auto: bf16-mixed, or 32-true on a CPU that has no fast
            products of bfloat16.
        workers: processes that assemble batches.
        gradient_checkpointing: recompute the activations inside layers instead of keeping them.
        compile: torch.compile each layer.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16-mixed", "bf16-true", "32-true", "64-true"] = "auto"
    workers: int = 2
    gradient_checkpointing: bool = False
    compile: bool = False


@dataclass(frozen=True)
class Watch:
    """Validation, checkpoints and loggers.

    Args:
        val_every: steps between validations; 0: only at the start and the end.
        val_packs: held-out rows whose loss is measured.
        val_prompts: held-out prompts decoded with the draft, for accepted_length per exit; 0: none.
        val_new_tokens: tokens decoded per prompt.
        num_draft_tokens: length of the chains drafted there.
        save_every: steps between the checkpoints that a run resumes from.
        loggers: tensorboard, wandb; metrics.csv is always written.
    """

    val_every: int = 200
    val_packs: int = 64
    val_prompts: int = 16
    val_new_tokens: int = 48
    num_draft_tokens: int = 5
    save_every: int = 100
    loggers: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RunConfig:
    """The options of every training run. `minutes` or `max_steps`, if given, count instead of `epochs`.

    Args:
        target: folder or Hub name of the model to draft for, which is the teacher too where there is one.
        data: conversations, best with the target's own answers: files, folders or data sets on the Hub.
        out: new folder for the draft, curves and run.json.
        epochs: passes over the data.
        max_steps: optimiser steps, instead of epochs.
        minutes: length of the run, instead of steps; max_steps is fixed once the first steps have been timed, and what
            is not done when the time is over is left undone.
        devices: devices per machine.
        num_nodes: machines.
        strategy: auto, ddp, fsdp, deepspeed_stage_2 or deepspeed_stage_3; fsdp_cpu_offload, deepspeed_stage_2_offload
            or deepspeed_stage_3_offload keep what they shard in the machine's memory (stage_2: all but the weights).
        ray: build the cache of --teacher or --features on many workers with Ray: local (this machine), or the HOST:PORT
            of a running cluster. Each loads the target; all must see the cache's folder and the data.
        ray_workers: workers of --ray; default: one per core, or per GPU.
        seed: seed of order, initialisation, dropout and on-policy answers.
        text: data and template.
        optim: learning rate, batch, optimiser.
        machine: device, precision, workers.
        watch: validation, checkpoints, loggers.
    """

    target: str
    data: list[str]
    out: str
    _: KW_ONLY
    epochs: float = 3.0
    max_steps: int | None = None
    minutes: float | None = None
    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"
    ray: str | None = None
    ray_workers: int | None = None
    seed: int = 0
    text: Text = Text()
    optim: Optim = Optim()
    machine: Machine = Machine()
    watch: Watch = Watch()

    @property
    def world(self) -> int:
        return self.devices * self.num_nodes

    @property
    def sharded(self) -> bool:
        """Whether each device holds only a part of the weights or of their gradients."""
        return self.strategy.startswith(SHARDED)

    @property
    def offloads(self) -> bool:
        """Whether what a device holds of them is in the machine's memory."""
        return self.strategy.endswith("offload")


@dataclass(frozen=True, slots=True)
class HeadsConfig(RunConfig):
    """The options of a run that trains Medusa or Hydra heads: those of every run. Heads begin untrained, and learn at
    higher rates than language models that begin as their target's layers."""

    _: KW_ONLY
    optim: Optim = Optim(lr=1e-3, warmup=0.1)


@dataclass(frozen=True, slots=True)
class EagleConfig(RunConfig):
    """The options of a run that trains an EAGLE head: those of every run. Its layer begins untrained, and learns
    several times faster with Muon than with AdamW (LOG.md)."""

    _: KW_ONLY
    optim: Optim = Optim(name="muon", lr=1e-3, warmup=0.05)


@dataclass(frozen=True, slots=True)
class TrainConfig(RunConfig):
    """The options of a run that trains a small language model: those of every run, and the draft's shape and start.

    Args:
        num_layers: layers of the draft.
        preset: a published shape instead of num_layers: wide-1, wide-3, wide-5 (the target's width), 290M, 543M, 796M,
            1.3B.
        init: the target's layers that the draft starts from: first, even (evenly spaced), fresh (random weights), or
            the folder of a trained draft to continue from.
        shape: hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, head_dim, where they differ
            from the target's.
        freeze: embeddings, head, or both: they stay the target's.
        lora_rank: train adapters of this rank and merge them at the end; 0: train the weights themselves.
    """

    num_layers: int | None = None
    preset: str | None = None
    init: str = "first"
    shape: dict[str, int] | None = None
    freeze: Sequence[str] = ()
    lora_rank: int = 0

    @property
    def layers(self) -> int:
        """The draft's number of layers, given by name or by preset."""
        if (self.num_layers is None) == (self.preset is None):
            raise ValueError("give either --num_layers or --preset")
        return self.num_layers if self.preset is None else find_preset(self.preset).num_layers  # type: ignore[return-value]


AnyConfig = TypeVar("AnyConfig", bound=RunConfig)

# Option -> (smallest, largest) value; None: no limit. An option that is None is not checked.
RANGES: dict[str, tuple[float, float | None]] = {
    "epochs": (0, None),
    "minutes": (0, None),
    "max_steps": (1, None),
    "num_layers": (1, None),
    "lora_rank": (0, None),
    "devices": (1, None),
    "num_nodes": (1, None),
    "ray_workers": (1, None),
    "seed": (0, None),
    "text.max_length": (2, None),
    "text.held_out": (0, 1),
    "text.limit": (1, None),
    "optim.lr": (0, None),
    "optim.batch_size": (1, None),
    "optim.micro_batch_size": (0, None),
    "optim.weight_decay": (0, None),
    "optim.beta1": (0, 1),
    "optim.beta2": (0, 1),
    "optim.warmup": (0, 1),
    "optim.floor": (0, 1),
    "optim.grad_clip": (0, None),
    "machine.workers": (0, None),
    "watch.val_every": (0, None),
    "watch.val_packs": (0, None),
    "watch.val_prompts": (0, None),
    "watch.val_new_tokens": (1, None),
    "watch.num_draft_tokens": (1, None),
    "watch.save_every": (1, None),
}
# The smallest and the largest value themselves are excluded.
ABOVE = {"epochs", "minutes"}
BELOW = {"text.held_out", "optim.beta1", "optim.beta2"}


def check_ranges(config: RunConfig) -> None:
    """ValueError for a number out of its range, or two lengths of one run; reads no file."""
    for name, (low, high) in RANGES.items():
        value = attrgetter(name)(config) if hasattr(config, name.partition(".")[0]) else None
        if value is None:
            continue
        above = value > low if name in ABOVE else value >= low
        below = high is None or (value < high if name in BELOW else value <= high)
        if not (above and below and math.isfinite(value)):
            least = f"above {low}" if name in ABOVE else f"at least {low}"
            most = "" if high is None else f" and below {high}" if name in BELOW else f" and at most {high}"
            raise ValueError(f"--{name} {value}: it must be {least}{most}")
    if config.minutes is not None and config.max_steps is not None:
        raise ValueError("--minutes and --max_steps are two lengths of one run: give one of them")


def resolved(config: AnyConfig) -> AnyConfig:
    """`config` with its automatic options resolved for this machine."""
    import torch

    from draftsmith.infer.models.products.prepack import multiplies_bfloat16

    if config.strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {config.strategy!r}: {', '.join(STRATEGIES)}")
    cuda = torch.cuda.is_available() if config.machine.device == "auto" else config.machine.device == "cuda"
    if config.machine.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: this machine has no CUDA device")
    if config.sharded:
        _check_sharded(config, cuda)
    _check_loggers(config.watch.loggers)
    precision = config.machine.precision
    if precision == "auto":
        precision = "bf16-mixed" if cuda or multiplies_bfloat16() else "32-true"
    return replace(
        config,
        strategy=config.strategy if config.strategy != "auto" or config.world == 1 else "ddp",
        optim=replace(config.optim, micro_batch_size=_micro_batch_size(config)),
        machine=replace(config.machine, device="cuda" if cuda else "cpu", precision=precision),
    )


def without_preset(config: TrainConfig) -> TrainConfig:
    """`config` with its preset's sizes in place of its name."""
    sizes = {} if config.preset is None else find_preset(config.preset).sizes
    return replace(config, num_layers=config.layers, preset=None, shape={**sizes, **(config.shape or {})} or None)


def _check_sharded(config: RunConfig, cuda: bool) -> None:
    deepspeed = config.strategy.startswith("deepspeed")
    if not cuda and (deepspeed or config.offloads):
        raise ValueError(f"strategy {config.strategy} needs CUDA devices; on a CPU use fsdp or ddp")
    if deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(f"strategy {config.strategy} needs the extra `deepspeed`: pip install 'draftsmith[deepspeed]'")
    if config.optim.name == "muon" and (deepspeed or config.offloads):
        raise ValueError(f"muon multiplies whole matrices, and {config.strategy} does not gather them: use adamw, or "
                         "fsdp or ddp")  # fmt: skip
    if config.machine.precision == "64-true" and not deepspeed:
        raise ValueError(f"strategy {config.strategy} trains in bf16-mixed, bf16-true or 32-true; in 64-true use ddp")
    if config.watch.val_prompts:
        raise ValueError(
            f"validation decodes with the whole draft, and {config.strategy} shards it: set --watch.val_prompts 0 "
            "(the loss is still measured), and run bench on the finished draft"
        )


def _check_loggers(loggers: Sequence[str]) -> None:
    for name in loggers:
        if name not in LOGGERS:
            raise ValueError(f"unknown logger {name!r}: tensorboard or wandb (metrics.csv is always written)")
        if importlib.util.find_spec(name) is None:
            extra = LOGGERS[name]
            raise ValueError(f"the logger {name} needs the extra `{extra}`: pip install 'draftsmith[{extra}]'")


def _micro_batch_size(config: RunConfig) -> int:
    if config.optim.batch_size % config.world:
        raise ValueError(f"batch_size {config.optim.batch_size} is not a multiple of the {config.world} devices")
    each = config.optim.batch_size // config.world
    micro = config.optim.micro_batch_size or next(size for size in (4, 3, 2, 1) if each % size == 0)
    if each % micro:
        raise ValueError(f"micro_batch_size {micro} does not divide the {each} rows of a device (batch_size / devices)")
    return micro
