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
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from draftsmith.infer.files.provenance import provenance, without_secrets
from draftsmith.infer.files.workers import check_workers, open_workers
from draftsmith.infer.text.templates import find_template, load_tokenizer, to_stderr, tokenizer_fingerprint
from draftsmith.train.data.batches import rank
from draftsmith.train.drafts.exits import TrainContext
from draftsmith.train.drafts.lm import LMBuilder
from draftsmith.train.drafts.trainable import BuildContext, Curves, DraftBuilder, Trainable, exit_curves
from draftsmith.train.objectives.objective import HeadObjective, Losses, Objective
from draftsmith.train.run.callbacks import FEW_STEPS, MEASURED, AtSteps, rows_for_steps
from draftsmith.train.run.config import RunConfig, TrainConfig, check_ranges, resolved, without_preset
from draftsmith.train.run.data_module import Batches, load_data, load_run_corpus
from draftsmith.train.run.memory import bytes_of, memory_estimate, resident_bytes
from draftsmith.train.run.module import Training
from draftsmith.train.run.optimisers import CPU_ADAMW, LearningRateSchedule
from draftsmith.train.run.ranks import DeadRankWatch, check_launch, lost_a_rank
from draftsmith.train.run.run_record import Metrics, RunRecord, draw_curves, state_step
from draftsmith.train.run.sharding import make_whole, shard_run
from draftsmith.train.run.stops import TERMINATED, Stopped
from draftsmith.train.run.trainers import make_trainer
from draftsmith.train.run.validation import accepted_lengths, held_out_losses, held_out_prompts

if TYPE_CHECKING:
    from draftsmith.infer.models.hf_target import HFTarget
    from draftsmith.infer.text.templates import Template
    from draftsmith.train.data.corpus import Corpus

ENDLESS = 10**9


def train_draft(objective: Objective, config: TrainConfig) -> dict[str, Any]:
    """Train a small language model; returns the contents of run.json; other ranks lack accepted lengths.

    Raises Stopped after SIGTERM and where the loss is not finite. A run of `minutes` that could not finish one step has
    max_steps 0, and its model is the untrained start.
    """
    check_ranges(config)
    exits = objective.exits(config.layers)
    sized = without_preset(config)
    builder = LMBuilder(exits, config.layers, config.init, sized.shape, config.freeze, config.lora_rank)
    return _train(objective, sized, builder, exit_curves(exits), {})


def train_heads(objective: HeadObjective, config: RunConfig, builder: DraftBuilder) -> dict[str, Any]:
    """The same for heads on the target's states, which `builder` makes."""
    check_ranges(config)
    made = {"draft": {"name": type(builder).__name__, **vars(builder)}}
    return _train(objective, config, builder, objective.curves(builder), made)


def _train(
    objective: Losses, config: RunConfig, builder: DraftBuilder, curves: Curves, made: dict[str, Any]
) -> dict[str, Any]:
    """`made`: settings of the draft that are not among config's."""
    began = time.monotonic()
    if objective.whole_draft and config.sharded:
        raise ValueError(
            f"the objective {type(objective).__name__} decodes with the whole draft, and {config.strategy} shards it: "
            "use ddp"
        )
    check_workers(config.ray, config.ray_workers)
    if config.ray is not None and not getattr(objective, "reads_cache", False):
        raise ValueError(
            "--ray builds a cache, and this run reads none: give --teacher DIR or --features DIR, if the command has "
            "it, or leave --ray out"
        )
    config = resolved(config)
    check_launch(config.devices, config.num_nodes)
    builder.check(config.strategy, config.machine.gradient_checkpointing)
    record = RunRecord(Path(config.out))
    learned = {"name": type(objective).__name__, **{key.lstrip("_"): value for key, value in vars(objective).items()}}
    tokenizer = load_tokenizer(config.target)
    notice = to_stderr if rank() == 0 else lambda line: None
    template = run_template(config, tokenizer, notice)
    config = replace(config, text=replace(config.text, template=template.name))
    settings = without_secrets({**asdict(config), **made, "objective": learned})
    facts = {**provenance(sys.argv, settings, config.seed), "settings": settings, "state": "running"}
    first = rank() == 0
    facts = record.open(facts, first)

    corpus, data = load_data(config, template, first)
    process = resident_bytes()
    loaded, target = _target(config)
    draft = builder.build(_build_context(config, loaded, corpus, tokenizer))
    length, device, seed = config.text.max_length, config.machine.device, config.seed
    workers = partial(open_workers, config.ray, config.ray_workers, device == "cuda")
    reload = partial(_reloaded, config)
    objective.begin(TrainContext(loaded, draft.model, corpus, length, device, seed, workers, reload))
    kept, size = weakref.ref(loaded), bytes_of(loaded.parameters())
    del loaded  # an objective that needs it keeps it
    frozen = kept()
    module = _module(objective, config, draft, frozen)
    _print_memory(config, draft, frozen, process, size, first)
    max_steps = facts.get("max_steps") or (None if config.minutes else config.max_steps or data.steps_in(config.epochs))
    module.schedule.max_steps = facts.get("planned_steps") or max_steps or ENDLESS
    module.schedule.measured = facts.get("measured_steps", MEASURED) if config.minutes else 0
    numbers = {f"{curves.word}s": list(curves.numbers)}
    facts |= {"max_steps": max_steps, **numbers, "data": corpus.report, "template": template.fingerprint()}
    if first:
        _warn_of_few_steps(config, data)
        record.begin(facts)
    metrics = Metrics(record.path / "metrics.csv", curves)
    watcher = AtSteps(
        record,
        metrics,
        curves,
        _validate(config, data, target, draft),
        val_every=config.watch.val_every,
        save_every=config.watch.save_every,
        deadline=None if max_steps or config.minutes is None else began + config.minutes * 60,
        batch_size=config.optim.batch_size,
    )
    fit(config, module, data, watcher, record, max_steps)
    make_whole(watcher.trainer, module, record)
    if first:
        draft.save(record.path, tokenizer, template.fingerprint())
        draw_curves(metrics, record.path / "curves.png", curves)
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


def _reloaded(config: RunConfig) -> TrainContext:
    """The target and the corpus of a run, as another worker loads them to build a cache."""
    loaded, tokenizer = load_frozen(config.target, config.machine.device)
    corpus = load_run_corpus(config, run_template(config, tokenizer, lambda line: None))
    return TrainContext(loaded, None, corpus, config.text.max_length, config.machine.device, config.seed)


def load_frozen(name: str, device: str) -> tuple[Any, Any]:
    """A target that a draft is trained for, still on the CPU, and its tokenizer. If it is to run on a CPU without fast
    products of bfloat16 it comes in float32, which takes a quarter of the time there."""
    from draftsmith.infer.models.load import load_model
    from draftsmith.infer.models.products.prepack import multiplies_bfloat16

    loaded, tokenizer = load_model(name, device="cpu")
    if device == "cpu" and loaded.dtype in (torch.bfloat16, torch.float16) and not multiplies_bfloat16():
        loaded = loaded.float()
    return loaded, tokenizer


def run_template(config: RunConfig, tokenizer: Any, notice: Callable[[str], None]) -> Template:
    text = config.text
    return find_template(text.template, tokenizer, text.template_kwargs, text.system, notice)


def _build_context(config: RunConfig, loaded: Any, corpus: Corpus, tokenizer: Any) -> BuildContext:
    from draftsmith.infer.heads.folders import TrainedFor
    from draftsmith.infer.models.hf_target import model_fingerprint

    layers = int(loaded.config.get_text_config().num_hidden_layers)
    trained_for = TrainedFor(config.target, model_fingerprint(loaded), tokenizer_fingerprint(tokenizer), layers)
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(config.machine.precision, torch.float32)
    machine = config.machine
    return BuildContext(
        loaded, corpus, dtype, config.seed, machine.gradient_checkpointing, machine.compile, trained_for,
        tuple(tokenizer.all_special_ids),
    )  # fmt: skip


def _module(objective: Losses, config: RunConfig, draft: Trainable, frozen: Any | None) -> Training:
    optim = config.optim
    fsdp = config.strategy.startswith("fsdp")
    return Training(
        draft,
        objective,
        LearningRateSchedule(optim.lr, 0, optim.warmup, optim.floor),
        optimiser=CPU_ADAMW if config.offloads and not fsdp else optim.name,
        weight_decay=optim.weight_decay,
        betas=(optim.beta1, optim.beta2),
        seed=config.seed,
        shard=partial(shard_run, target=frozen) if fsdp else None,
    )


def _warn_of_few_steps(config: RunConfig, data: Batches) -> None:
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


def _target(config: RunConfig) -> tuple[Any, HFTarget | None]:
    """The target's model, and the target where validation decodes with it."""
    from draftsmith.infer.models.hf_target import HFTarget

    loaded, tokenizer = load_frozen(config.target, config.machine.device)
    longest = getattr(loaded.config.get_text_config(), "max_position_embeddings", config.text.max_length)
    if config.text.max_length > longest:
        raise ValueError(f"max_length {config.text.max_length} exceeds the target's {longest} positions")
    wanted = config.watch.val_prompts and config.text.held_out and rank() == 0
    target = HFTarget(loaded.to(config.machine.device), tokenizer) if wanted else None
    return loaded, target


def _print_memory(config: RunConfig, draft: Trainable, target: Any, process: int, loaded: int, first: bool) -> None:
    """`target`: the target's model, if it stays loaded; `process`: resident bytes before it was; `loaded`: its own."""
    mixed = config.machine.precision == "bf16-mixed"
    cuda = config.machine.device == "cuda"
    parts = memory_estimate(
        draft,
        rows=config.optim.micro_batch_size,
        length=config.text.max_length,
        optimiser=config.optim.name,
        autocast=torch.bfloat16 if mixed else None,
        checkpointing=config.machine.gradient_checkpointing,
        cuda=cuda,
        strategy=config.strategy,
        ranks=config.world,
        target=target,
        process=process,
        loaded=loaded,
    )
    if first:
        total, offloaded = parts.pop("total"), parts.pop("offloaded", 0)
        listed = ", ".join(f"{name} {size:.2f}" for name, size in parts.items() if size)
        beside = f", and {offloaded:.2f} GiB of the machine's" if offloaded else ""
        print(f"memory per device, estimated: {total:.2f} GiB ({listed}){beside}", file=sys.stderr)


def _validate(config: RunConfig, data: Batches, target: HFTarget | None, draft: Trainable) -> Any:
    watch = config.watch
    longest = min(config.text.max_length, target.max_positions if target else 0) - watch.val_new_tokens
    prompts = held_out_prompts(data.corpus, data.held_out, watch.val_prompts, longest) if target else []

    def validate(module: Training) -> dict[str, Any]:
        losses = held_out_losses(module, data)
        found: dict[str, Any] = {"losses": losses} if losses else {}
        if target is not None and prompts:
            lengths = accepted_lengths(target, draft.drafters(watch.num_draft_tokens), prompts, watch.val_new_tokens)
            found |= {name: round(length, 4) for name, length in lengths.items()}
        module.trainer.strategy.barrier()
        return found

    return validate


def fit(
    config: RunConfig, module: Training, data: Batches, watcher: AtSteps, record: RunRecord, max_steps: int | None
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
        watcher.trainer = make_trainer(config, watcher, record, max_steps or ENDLESS)
        watch = DeadRankWatch(lambda: _kept(record))
        try:
            with watch.running():
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
            if config.world > 1 and lost_a_rank(error):
                watch.end()
            # A worker that the same SIGTERM ended.
            if not watcher.sigterm.received:
                raise
            raise _explained(Stopped("stopped by SIGTERM", TERMINATED), record) from error


def _kept(record: RunRecord) -> str:
    newest = record.newest_state()
    kept = f"after step {state_step(newest)}" if newest else "before the first step was finished"
    return f" {kept}; run the same command again to {'resume' if newest else 'start over'}"


def _explained(stop: Stopped, record: RunRecord) -> Stopped:
    """`stop` with what is kept of the run, and what to do."""
    newest = record.newest_state()
    if stop.exit_code == TERMINATED:
        return Stopped(f"{stop}{_kept(record)}", TERMINATED)
    kept = f"the last good state is {newest}" if newest else "no state was saved"
    return Stopped(f"{stop} ({kept})", stop.exit_code)
