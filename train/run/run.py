"""A training run from its options to the finished model: data, draft, objective and trainer put together.

Run again with the same options, it resumes from the newest checkpoint. A finished run is never overwritten.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
import warnings
import weakref
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from draftsmith.infer.files.provenance import provenance, without_secrets
from draftsmith.infer.models.layers import find_parts
from draftsmith.infer.text.templates import Template, find_template, load_tokenizer, to_stderr
from draftsmith.train.data.batches import rank
from draftsmith.train.drafts.exits import ExitStates, TrainContext
from draftsmith.train.drafts.init import freeze, init_draft
from draftsmith.train.drafts.lora import add_lora, merge_lora
from draftsmith.train.export.export import save_model
from draftsmith.train.objectives.objective import Objective
from draftsmith.train.run.callbacks import FEW_STEPS, MEASURED, AtSteps, rows_for_steps
from draftsmith.train.run.config import TrainConfig, check_ranges, resolved
from draftsmith.train.run.data_module import Batches, load_data
from draftsmith.train.run.memory import memory_estimate, resident_bytes, shards_of
from draftsmith.train.run.module import Training
from draftsmith.train.run.optimisers import LearningRateSchedule
from draftsmith.train.run.run_record import Metrics, RunRecord, draw_curves, state_step
from draftsmith.train.run.stops import TERMINATED, Stopped
from draftsmith.train.run.trainers import final_state, make_trainer
from draftsmith.train.run.validation import accepted_lengths, held_out_losses, held_out_prompts

if TYPE_CHECKING:
    from draftsmith.infer.models.hf_target import HFTarget

ENDLESS = 10**9


def train_draft(objective: Objective, config: TrainConfig) -> dict[str, Any]:
    """Run `config` to its end; returns the contents of run.json; other ranks lack accepted lengths.

    Raises Stopped after SIGTERM and where the loss is not finite. A run of `minutes` that could not finish one step has
    max_steps 0, and its model is the untrained start.
    """
    began = time.monotonic()
    check_ranges(config)
    exits = objective.exits(config.layers)
    if objective.whole_draft and config.sharded:
        raise ValueError(
            f"the objective {type(objective).__name__} decodes with the whole draft, and {config.strategy} shards it: "
            "use ddp"
        )
    config = resolved(config)
    record = RunRecord(Path(config.out))
    learned = {"name": type(objective).__name__, **{key.lstrip("_"): value for key, value in vars(objective).items()}}
    tokenizer = load_tokenizer(config.target)
    notice = to_stderr if rank() == 0 else lambda line: None
    template = find_template(config.text.template, tokenizer, config.text.template_kwargs, config.text.system, notice)
    config = replace(config, text=replace(config.text, template=template.name))
    settings = without_secrets({**asdict(config), "objective": learned})
    facts = {**provenance(sys.argv, settings, config.seed), "settings": settings, "state": "running"}
    first = rank() == 0
    facts = record.open(facts, first)

    corpus, data = load_data(config, template, first)
    process = resident_bytes()
    loaded, target, model = _models(config)
    objective.begin(TrainContext(loaded, model, corpus, config.text.max_length, config.machine.device, config.seed))
    kept = weakref.ref(loaded)
    del loaded  # an objective that needs it keeps it
    module = _module(objective, config, model, exits)
    _print_memory(config, module.draft, kept(), process, first)
    max_steps = facts.get("max_steps") or (None if config.minutes else config.max_steps or data.steps_in(config.epochs))
    module.schedule.max_steps = facts.get("planned_steps") or max_steps or ENDLESS
    module.schedule.measured = facts.get("measured_steps", MEASURED) if config.minutes else 0
    facts |= {"max_steps": max_steps, "exits": exits, "data": corpus.report, "template": template.fingerprint()}
    if first:
        _warn_of_few_steps(config, data)
        record.begin(facts)
    metrics = Metrics(record.path / "metrics.csv", exits)
    watcher = AtSteps(
        record,
        metrics,
        exits,
        _validate(config, data, target, model, exits),
        val_every=config.watch.val_every,
        save_every=config.watch.save_every,
        deadline=None if max_steps or config.minutes is None else began + config.minutes * 60,
        batch_size=config.optim.batch_size,
    )
    fit(config, module, data, watcher, record, max_steps)
    state = final_state(watcher.trainer, module, record)
    if first:
        _finish(config, record, model, tokenizer, metrics, exits, template, state)
    ended = {
        "state": "finished",
        "max_steps": watcher.trainer.global_step,
        "results": watcher.last,
        "train_seconds": round(time.monotonic() - began, 1),
    }
    if not first:
        return {**facts, **ended}
    record.update(**ended)
    record.clean()
    return record.read()


def _module(objective: Objective, config: TrainConfig, model: Any, exits: list[int]) -> Training:
    optim = config.optim
    return Training(
        ExitStates(model, exits),
        objective,
        LearningRateSchedule(optim.lr, 0, optim.warmup, optim.floor),
        optimiser=optim.name,
        weight_decay=optim.weight_decay,
        betas=(optim.beta1, optim.beta2),
        seed=config.seed,
    )


def _warn_of_few_steps(config: TrainConfig, data: Batches) -> None:
    """Where the data decides the number of steps."""
    if config.max_steps or config.minutes:
        return
    steps, rows = data.steps_in(config.epochs), config.optim.batch_size
    if steps >= FEW_STEPS:
        return
    fitting = rows_for_steps(data.rows_in(config.epochs))
    mend = f"--optim.batch_size {fitting} or more --epochs" if 0 < fitting < rows else "more --epochs or more data"
    print(f"warning: {config.epochs:g} epochs of this data are only {steps} optimiser steps of {rows} rows, too few to "
          f"learn from; give {mend}", file=sys.stderr)  # fmt: skip


def _finish(
    config: TrainConfig, record: RunRecord, model: Any, tokenizer: Any, metrics: Metrics, exits: list[int],
    template: Template, state: dict[str, torch.Tensor] | None,
) -> None:  # fmt: skip
    """Save the model and its curves; `state` holds the weights where the module does not."""
    if config.lora_rank:
        merge_lora(model, state)
        state = None
    save_model(record.path, model, tokenizer, exits=exits, template_fingerprint=template.fingerprint(), state=state)
    draw_curves(metrics, record.path / "curves.png", exits)


def _models(config: TrainConfig) -> tuple[Any, HFTarget | None, Any]:
    """The target's model, the target where validation decodes with it, and the draft to train."""
    from draftsmith.infer.models.hf_target import HFTarget
    from draftsmith.infer.models.load import load_model

    loaded, tokenizer = load_model(config.target, device="cpu")
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(config.machine.precision, torch.float32)
    model = init_draft(
        loaded, num_layers=config.layers, how=config.init, shape=config.shape, seed=config.seed, dtype=dtype
    )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", config.text.max_length)
    if config.text.max_length > longest:
        raise ValueError(f"max_length {config.text.max_length} exceeds the target's {longest} positions")
    freeze(model, config.freeze)
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.seed)
    if config.machine.gradient_checkpointing:
        # transformers has renamed the method and will drop the old name.
        new = getattr(model, "activation_checkpointing_enable", None)
        (new or model.gradient_checkpointing_enable)({"use_reentrant": False})
    if config.machine.compile:
        for layer in find_parts(model).layers:
            layer.compile()
    wanted = config.watch.val_prompts and config.text.held_out and rank() == 0
    target = HFTarget(loaded.to(config.machine.device), tokenizer) if wanted else None
    return loaded, target, model.train()


def _print_memory(config: TrainConfig, draft: ExitStates, target: Any, process: int, first: bool) -> None:
    """`target`: the target's model, if it stays loaded; `process`: resident bytes before it was."""
    mixed = config.machine.precision == "bf16-mixed"
    cuda = config.machine.device == "cuda"
    parts = memory_estimate(
        draft,
        rows=config.optim.micro_batch_size,
        length=config.text.max_length,
        optimiser=config.optim.name,
        autocast=torch.bfloat16 if mixed else None,
        checkpointing=config.machine.gradient_checkpointing,
        shards=shards_of(config.strategy, config.world),
        cuda=cuda,
        target=target if target is not None and target.device.type == config.machine.device else None,
        process=process,
    )
    if first:
        listed = ", ".join(f"{name} {size:.2f}" for name, size in parts.items() if name != "total" and size)
        print(f"memory per device, estimated: {parts['total']:.2f} GiB ({listed})", file=sys.stderr)


def _validate(config: TrainConfig, data: Batches, target: HFTarget | None, model: Any, exits: list[int]) -> Any:
    longest = min(config.text.max_length, target.max_positions if target else 0) - config.watch.val_new_tokens
    prompts = held_out_prompts(data.corpus, data.held_out, config.watch.val_prompts, longest) if target else []

    def validate(module: Training) -> dict[str, Any]:
        losses = held_out_losses(module, data)
        found: dict[str, Any] = {"losses": losses} if losses else {}
        if target is not None and prompts:
            lengths = accepted_lengths(
                target, model, exits, prompts,
                max_new_tokens=config.watch.val_new_tokens, num_draft_tokens=config.watch.num_draft_tokens,
            )  # fmt: skip
            found |= {f"accepted_length_exit_{exit}": round(n, 4) for exit, n in zip(exits, lengths)}
        module.trainer.strategy.barrier()
        return found

    return validate


def fit(
    config: TrainConfig, module: Training, data: Batches, watcher: AtSteps, record: RunRecord, max_steps: int | None
) -> None:
    """Train to `max_steps`, from the newest checkpoint if there is one."""
    newest = record.newest_state()
    if newest is not None and rank() == 0:
        print(f"resuming from {newest.name}", file=sys.stderr)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # Lightning's advice about settings that are deliberate here: idle devices, few workers, logged steps.
        warnings.filterwarnings("ignore", module="lightning.*")
        warnings.filterwarnings("ignore", message=".*find_unused_parameters.*")
        watcher.trainer = make_trainer(config, module, watcher, record, max_steps or ENDLESS)
        try:
            watcher.trainer.fit(module, datamodule=data, ckpt_path=newest)
        except Stopped as stop:
            raise _explained(stop, record) from stop
        except OSError as error:
            raise ValueError(
                f"{record.path}: {error.strerror or error}; run the same command again to resume"
            ) from error
        except SystemExit as stop:
            # How Lightning ends on Ctrl-C; it ignores any further Ctrl-C.
            if not watcher.trainer.interrupted:
                raise
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt("run the same command again to resume from the last checkpoint") from stop
        except RuntimeError as error:
            # A worker that the same SIGTERM ended.
            if not watcher.sigterm.received:
                raise
            raise _explained(Stopped("stopped by SIGTERM", TERMINATED), record) from error


def _explained(stop: Stopped, record: RunRecord) -> Stopped:
    """`stop` with what is kept of the run, and what to do."""
    newest = record.newest_state()
    if stop.exit_code == TERMINATED:
        kept = f"after step {state_step(newest)}" if newest else "before the first step was finished"
        again = "resume" if newest else "start over"
        return Stopped(f"{stop} {kept}; run the same command again to {again}", TERMINATED)
    kept = f"the last good state is {newest}" if newest else "no state was saved"
    return Stopped(f"{stop} ({kept})", stop.exit_code)
