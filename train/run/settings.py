"""The options of a training command in groups, as YAML and flags give them: `--optim.lr 2e-5`.

Configuration ends in run.py: no model, loss or loader sees one of these.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Text:
    """What is learned from, and how it is served.

    Args:
        template: auto (chat, or plain without one), chat (the tokenizer's own), plain, a format such as
            'USER: {prompt} ASSISTANT:', or the name of a FastChat template (vicuna_v1.1).
        template_kwargs: passed to the chat template (enable_thinking: false).
        system: a system message for conversations that have none.
        max_length: tokens of a packed row, and of the longest sequence.
        held_out: the share of conversations that is kept for validation.
        split_by: conversation (a hash of its beginning), or time (the newest are held out).
        limit: read so many records at most.
        cache: folder of tokenised data; not given: the user's cache folder.
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
    """How weights move.

    Args:
        lr: peak learning rate.
        batch_size: packed rows of an optimiser step, over all devices.
        micro_batch_size: packed rows that a device holds at once; 0: as many as batch_size and devices allow, up to 4.
        name: adamw, or muon (matrices inside the layers by Muon, the rest by AdamW).
        weight_decay: of matrices.
        beta1: AdamW's.
        beta2: AdamW's.
        warmup: share of the steps that the learning rate climbs.
        floor: the share of the peak that the cosine ends at.
        grad_clip: largest norm of the gradient; 0 leaves it.
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
    """Where it runs.

    Args:
        device: auto, cpu or cuda.
        precision: auto (bf16-mixed), bf16-mixed, bf16-true, 32-true or 64-true.
        workers: processes that assemble batches.
        gradient_checkpointing: keep no activations inside layers, and compute them again.
        compile: torch.compile each layer.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16-mixed", "bf16-true", "32-true", "64-true"] = "auto"
    workers: int = 2
    gradient_checkpointing: bool = False
    compile: bool = False


@dataclass(frozen=True)
class Watch:
    """What is measured and kept on the way.

    Args:
        val_every: steps between validations; 0: at the start and the end only.
        val_packs: held-out rows whose loss is measured.
        val_prompts: held-out prompts that are decoded with the draft, for accepted_length per exit; 0: none.
        val_new_tokens: tokens decoded per prompt.
        num_draft_tokens: how deep is drafted there.
        save_every: steps between states to resume from.
        loggers: tensorboard, wandb; metrics.csv is always written.
    """

    val_every: int = 200
    val_packs: int = 64
    val_prompts: int = 16
    val_new_tokens: int = 48
    num_draft_tokens: int = 5
    save_every: int = 100
    loggers: list[str] = field(default_factory=list)
