"""`draftsmith train sft`, `soft`, `distil`, `draft`, `target`, `eagle`, `medusa` and `hydra`: from options to a draft.

The options are those of TrainConfig (for heads RunConfig and the builder's class) and of the objective's class.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from json import dumps
from pathlib import Path
from typing import Any, cast

from draftsmith.train.drafts.eagle import EagleBuilder
from draftsmith.train.drafts.hydra import HydraBuilder
from draftsmith.train.drafts.medusa import MedusaBuilder
from draftsmith.train.drafts.trainable import DraftBuilder
from draftsmith.train.objectives.distil import Distil
from draftsmith.train.objectives.eagle import EagleObjective
from draftsmith.train.objectives.future_tokens import FutureTokens
from draftsmith.train.objectives.objective import HeadObjective, LossSums, Objective
from draftsmith.train.objectives.sft import SFT
from draftsmith.train.objectives.soft import SoFT
from draftsmith.train.run.config import EagleConfig, HeadsConfig, Machine, Optim, RunConfig, Text, TrainConfig, Watch


def sft(config: TrainConfig, objective: SFT, /, *, json: bool = False) -> int:
    """Train a draft model by supervised fine-tuning. Run again with the same options, it resumes.

    Example: draftsmith train sft --target MODEL --data answers.jsonl --out draft --num_layers 2

    Args:
        json: print one JSON object on the last line.
    """
    return draft(config, objective=objective, json=json)


def soft(config: TrainConfig, objective: SoFT, /, *, json: bool = False) -> int:
    """Train one draft model with several exits (sorted fine-tuning). Run again with the same options, it resumes.

    Example: draftsmith train soft --target MODEL --data answers.jsonl --out sorted --num_layers 12 --exits 6 9 12

    Args:
        json: print one JSON object on the last line.
    """
    return draft(config, objective=objective, json=json)


def distil(config: TrainConfig, objective: Distil, /, *, json: bool = False) -> int:
    """Train a draft model on the target's own distribution (distillation). Run again with the same options, it resumes.

    Example: draftsmith train distil --target MODEL --data answers.jsonl --out wide --preset wide-3

    Args:
        json: print one JSON object on the last line.
    """
    return draft(config, objective=objective, json=json)


# jsonargparse compares a protocol's annotations by spelling; a Callable takes any class with __call__.
def draft(config: TrainConfig, /, *, objective: Callable[..., LossSums], json: bool = False) -> int:
    """Train a draft model with any objective, named by its class path. Run again with the same options, it resumes.

    Example: draftsmith train draft --target T --data F --out D --num_layers 2 --objective draftsmith.train.objectives.sft.SFT

    Args:
        objective: class_path of a class with the methods of draftsmith.train.objectives.objective.Objective, and
            init_args for its arguments: `objective: {class_path: my.module.Mine, init_args: {...}}`.
        json: print one JSON object on the last line.
    """  # noqa: E501
    from draftsmith.train.run.run import train_draft

    names = ("max_steps", "exits", "results", "train_seconds", "settings")
    return _finished(lambda: train_draft(cast(Objective, objective), config), names if json else ())


def eagle(config: EagleConfig, builder: EagleBuilder, objective: EagleObjective, /, *, json: bool = False) -> int:
    """Train an EAGLE-3 head on a target that stays frozen. Run again with the same options, it resumes.

    Example: draftsmith train eagle --target MODEL --data answers.jsonl --out head

    Args:
        json: print one JSON object on the last line.
    """
    return heads(config, builder, objective, json)


def medusa(config: HeadsConfig, builder: MedusaBuilder, objective: FutureTokens, /, *, json: bool = False) -> int:
    """Train Medusa heads on a target that stays frozen (Medusa-1). Run again with the same options, it resumes.

    Example: draftsmith train medusa --target MODEL --data answers.jsonl --out heads --num_heads 4

    Args:
        json: print one JSON object on the last line.
    """
    return heads(config, builder, objective, json)


def hydra(config: HeadsConfig, builder: HydraBuilder, objective: FutureTokens, /, *, json: bool = False) -> int:
    """Train Hydra heads on a target that stays frozen; with --prefix those of Hydra++. Run again with the same options,
    it resumes.

    Example: draftsmith train hydra --target MODEL --data answers.jsonl --out heads --num_heads 4

    Args:
        json: print one JSON object on the last line.
    """
    return heads(config, builder, objective, json)


def heads(config: RunConfig, builder: DraftBuilder, objective: HeadObjective, json: bool) -> int:
    """Train what `builder` makes."""
    from draftsmith.train.run.run import train_heads

    names = ("max_steps", "results", "train_seconds", "settings")
    return _finished(lambda: train_heads(objective, config, builder), names if json else ())


def target(
    *,
    data: list[str],
    out: str,
    vocab_size: int = 8192,
    hidden_size: int = 512,
    num_layers: int = 8,
    max_steps: int | None = None,
    minutes: float | None = None,
    epochs: float = 1.0,
    seed: int = 0,
    text: Text = Text(max_length=512),
    optim: Optim = Optim(lr=1e-3, batch_size=16, name="muon", warmup=0.04),
    machine: Machine = Machine(),
    watch: Watch = Watch(val_prompts=0),
    json: bool = False,
) -> int:
    """Train a small target and its tokenizer from scratch on local text, to try everything else without a hub.

    Example: draftsmith train target --data texts/ --out target --minutes 30

    Args:
        data: text or conversations: files and folders.
        out: new folder for the model, tokenizer and run.json.
        vocab_size: tokens of the byte-level BPE tokenizer.
        hidden_size: width of the model.
        num_layers: depth of the model.
        max_steps: optimiser steps, instead of epochs.
        minutes: length of the run, instead of steps.
        epochs: passes over the data.
        seed: seed of weights and order.
        text: data and template.
        optim: learning rate, batch, optimiser.
        machine: device, precision, workers.
        watch: validation, checkpoints, loggers.
        json: print one JSON object on the last line.
    """
    from draftsmith.train.run.target import train_target

    config = TrainConfig(
        str(Path(out) / "start"), data, out, num_layers, epochs=epochs, max_steps=max_steps, minutes=minutes, seed=seed,
        text=text, optim=optim, machine=machine, watch=watch,
    )  # fmt: skip
    names = ("max_steps", "results", "train_seconds")
    return _finished(lambda: train_target(config, vocab_size, hidden_size), names if json else ())


def _finished(train: Callable[[], dict[str, Any]], names: Sequence[str]) -> int:
    """Run `train` and print the facts called `names`; returns the exit code.

    0: trained, if only for as long as --minutes allowed. 1: the loss was not finite, or not one step fitted --minutes:
    the model that was written then is the untrained start, which a script should not go on with. 143: SIGTERM.
    """
    from draftsmith.train.data.batches import rank
    from draftsmith.train.run.stops import Stopped

    try:
        facts = train()
    except Stopped as stop:
        if rank() == 0:
            print(f"draftsmith train: {stop}", file=sys.stderr)
        return stop.exit_code
    if names and rank() == 0:
        print(dumps({name: facts.get(name) for name in names}))
    if rank() == 0 and not facts["max_steps"]:
        print("draftsmith train: the time was over before the first optimiser step was finished, so the model is the "
              "untrained start; give a smaller --optim.batch_size or more --minutes", file=sys.stderr)  # fmt: skip
    return int(not facts["max_steps"])
