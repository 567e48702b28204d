"""`draftsmith train sft`, `train soft`, `train target`: options to a finished model, by draftsmith.train.

No training happens here; what the options mean stands in draftsmith.train.run.settings and draftsmith.train.run.config.
"""

from __future__ import annotations

from json import dumps
from typing import TYPE_CHECKING, Any

from draftsmith.recipes.cli.options_of import with_options_of
from draftsmith.recipes.cli.ranges import FloatFrom0, IntFrom0, IntFrom1
from draftsmith.train.run.settings import Machine, Optim, Text, Watch

if TYPE_CHECKING:
    from draftsmith.train.objectives.objective import Objective


def sft(
    *,
    target: str,
    data: list[str],
    out: str,
    num_layers: IntFrom1,
    exits: list[IntFrom1] | None = None,
    init: str = "first",
    shape: dict[str, int] | None = None,
    freeze: list[str] | None = None,
    lora_rank: int = 0,
    epochs: float = 3.0,
    max_steps: int | None = None,
    minutes: float | None = None,
    devices: int = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    seed: IntFrom0 = 0,
    text: Text = Text(),
    optim: Optim = Optim(),
    machine: Machine = Machine(),
    watch: Watch = Watch(),
    json: bool = False,
) -> None:
    """Train a draft model by supervised fine-tuning. Run again with the same options, it goes on where it stopped.

    Example: draftsmith train sft --target MODEL --data answers.jsonl --out draft --num_layers 2

    Args:
        target: folder or Hub name of the model to draft for.
        data: conversations: files, folders or data sets on the Hub.
        out: the new folder for model, curves and run.json.
        num_layers: layers of the draft.
        exits: not for sft, whose one exit is the whole draft.
        init: which of the target's layers the draft begins as: first, even (evenly spaced), or fresh (at random).
        shape: hidden_size, intermediate_size, ... of a fresh draft that is not as wide as the target.
        freeze: embeddings, head, or both stay the target's.
        lora_rank: train adapters of this rank and merge them at the end; 0 trains the weights themselves.
        epochs: passes over the data.
        max_steps: optimiser steps, instead of epochs.
        minutes: train so long, instead: the first steps are measured, then max_steps is fixed.
        devices: devices per machine.
        num_nodes: machines.
        strategy: auto, ddp, fsdp, deepspeed_stage_2 or deepspeed_stage_3.
        seed: of order, initialisation and dropout.
        text: data and template.
        optim: learning rate, batch, optimiser.
        machine: device, precision, workers.
        watch: validation, states, loggers.
        json: print one JSON object on the last line.
    """
    options = dict(locals())
    from draftsmith.train.objectives.sft import SFT

    if exits not in (None, [num_layers]):
        raise ValueError(f"exits {exits}: sft trains one exit, the whole draft; several are trained by `train soft`")
    train(SFT(), options)


@with_options_of(sft)
def soft(*, exits: list[IntFrom1], exit_weights: list[FloatFrom0] | None = None, **options: Any) -> None:
    """Train one draft model that can be left at several depths (sorted fine-tuning).

    Example: draftsmith train soft --target MODEL --data answers.jsonl --out sorted --num_layers 12 --exits 6 9 12

    Args:
        exits: numbers of layers after which the draft can be left; the last is num_layers.
        exit_weights: weights of the exits' losses; equal where none are given.
    """
    from draftsmith.train.objectives.soft import SoFT

    train(SoFT(exits, exit_weights), options)


def train(objective: Objective, options: dict[str, Any]) -> None:
    """A draft by `objective`; `options` are those of `sft`."""
    from draftsmith.train.run.config import TrainConfig
    from draftsmith.train.run.run import train_draft

    json = options.pop("json", False)
    options.pop("exits", None)
    facts = train_draft(objective, TrainConfig(**{**options, "freeze": tuple(options.get("freeze") or ())}))
    if json:
        names = ("max_steps", "exits", "results", "train_seconds", "settings")
        print(dumps({name: facts.get(name) for name in names}))


def target(
    *,
    data: list[str],
    out: str,
    vocab_size: int = 8192,
    hidden_size: int = 512,
    num_layers: IntFrom1 = 8,
    max_steps: int | None = None,
    minutes: float | None = None,
    epochs: float = 1.0,
    seed: IntFrom0 = 0,
    text: Text = Text(max_length=512),
    optim: Optim = Optim(lr=1e-3, batch_size=16, name="muon", warmup=0.04),
    machine: Machine = Machine(),
    watch: Watch = Watch(val_prompts=0),
    json: bool = False,
) -> None:
    """Train a small target from scratch on local text, tokenizer included, so that all else can be tried without a hub.

    Example: draftsmith train target --data texts/ --out target --minutes 30

    Args:
        data: text or conversations: files and folders.
        out: the new folder for model, tokenizer and run.json.
        vocab_size: of the byte-level BPE tokenizer.
        hidden_size: width of the model.
        num_layers: its depth.
        max_steps: optimiser steps, instead of epochs.
        minutes: train so long, instead.
        epochs: passes over the data.
        seed: of weights and order.
        text: data and template.
        optim: learning rate, batch, optimiser.
        machine: device, precision, workers.
        watch: validation, states, loggers.
        json: print one JSON object on the last line.
    """
    options = dict(locals())
    from draftsmith.train.run.target import train_target

    json = options.pop("json")
    facts = train_target(**options)
    if json:
        print(dumps({name: facts.get(name) for name in ("max_steps", "results", "train_seconds")}))
