"""A training run from its options to the finished model: the one place that puts data, draft, objective and trainer
together.

Run again with the same options, it goes on from the newest state; a finished run is not touched. What is learned and
how is the objective's (sft.py, soft.py), which is handed in.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from draftsmith.infer.files.locations import cache_folder
from draftsmith.infer.files.provenance import provenance, without_secrets
from draftsmith.infer.models.layers import find_parts
from draftsmith.infer.text.templates import Template, find_template, load_tokenizer, to_stderr
from draftsmith.train.data.batches import Batches, rank
from draftsmith.train.data.corpus import Corpus, load_corpus, split
from draftsmith.train.drafts.context import TrainContext
from draftsmith.train.drafts.exits import ExitStates
from draftsmith.train.drafts.init import freeze, init_draft
from draftsmith.train.drafts.lora import add_lora, merge_lora
from draftsmith.train.export.checkpoint import save_model
from draftsmith.train.objectives.objective import Objective
from draftsmith.train.run.callbacks import MEASURED, AtSteps
from draftsmith.train.run.config import TrainConfig, resolved
from draftsmith.train.run.memory import memory_estimate, shards_of
from draftsmith.train.run.module import Training
from draftsmith.train.run.optimisers import Schedule
from draftsmith.train.run.run_record import Metrics, RunRecord, draw_curves
from draftsmith.train.run.trainers import final_state, make_trainer
from draftsmith.train.run.validation import accepted_lengths, held_out_losses, held_out_prompts

if TYPE_CHECKING:
    from draftsmith.infer.models.hf_target import HFTarget

ENDLESS = 10**9


def train_draft(objective: Objective, plan: TrainConfig, command: list[str] | None = None) -> dict[str, Any]:
    """Run `plan` to its end; returns what run.json holds."""
    began = time.monotonic()
    exits = objective.exits(plan.num_layers)
    plan = resolved(plan)
    record = RunRecord(Path(plan.out))
    learned = {"name": type(objective).__name__, **{key.lstrip("_"): value for key, value in vars(objective).items()}}
    tokenizer = load_tokenizer(plan.target)
    notice = to_stderr if rank() == 0 else lambda line: None
    template = find_template(plan.text.template, tokenizer, plan.text.template_kwargs, plan.text.system, notice)
    plan = replace(plan, text=replace(plan.text, template=template.name))
    settings = without_secrets({**asdict(plan), "objective": learned})
    facts = {**provenance(command or sys.argv, settings, plan.seed), "settings": settings, "state": "running"}
    first = rank() == 0
    facts = record.open(facts, first)

    corpus, data = load_data(plan, template, first)
    loaded, target, model = _models(plan)
    objective.begin(TrainContext(loaded, model, corpus, plan.text.max_length, plan.machine.device))
    del loaded  # the objective keeps it if it needs it
    module = _module(objective, plan, model, exits)
    _tell_memory(plan, model, exits, first)
    max_steps = facts.get("max_steps") or (None if plan.minutes else plan.max_steps or data.steps_in(plan.epochs))
    module.schedule.max_steps = max_steps or ENDLESS
    if first:
        found = {"max_steps": max_steps, "exits": exits, "data": corpus.report, "template": template.fingerprint()}
        record.begin({**facts, **found})
    metrics = Metrics(record.path / "metrics.csv", exits)
    watcher = AtSteps(
        record,
        metrics,
        exits,
        _validate(plan, data, target, model, exits),
        val_every=plan.watch.val_every,
        save_every=plan.watch.save_every,
        deadline=None if max_steps or plan.minutes is None else began + plan.minutes * 60,
    )
    fit(plan, module, data, watcher, record, max_steps)
    state = final_state(watcher.trainer, module, record)
    if first:
        _finish(plan, record, model, tokenizer, metrics, exits, template, state)
        record.update(state="finished", results=watcher.last, train_seconds=round(time.monotonic() - began, 1))
        record.clean()
        facts = record.read()
    return facts


def _module(objective: Objective, plan: TrainConfig, model: Any, exits: list[int]) -> Training:
    optim = plan.optim
    return Training(
        ExitStates(model, exits),
        objective,
        Schedule(optim.lr, 0, optim.warmup, optim.floor, MEASURED if plan.minutes else 0),
        optimiser=optim.name,
        weight_decay=optim.weight_decay,
        betas=(optim.beta1, optim.beta2),
        seed=plan.seed,
    )


def _finish(
    plan: TrainConfig, record: RunRecord, model: Any, tokenizer: Any, metrics: Metrics, exits: list[int],
    template: Template, state: dict[str, torch.Tensor] | None,
) -> None:  # fmt: skip
    """Leave the model and its curves; `state` are the weights where the module does not hold them."""
    if plan.lora_rank:
        merge_lora(model, state)
        state = None
    save_model(record.path, model, tokenizer, exits=exits, template_fingerprint=template.fingerprint(), state=state)
    draw_curves(metrics, record.path / "curves.png", exits)


def load_data(plan: TrainConfig, template: Template, first: bool) -> tuple[Corpus, Batches]:
    """What a resolved plan trains on, and holds out; `first`: this process tells people."""
    cache = Path(plan.text.cache or cache_folder() / "tokens").expanduser()
    corpus = load_corpus(plan.data, template, max_length=plan.text.max_length, cache=cache, limit=plan.text.limit)
    train, held_out = split(corpus, plan.text.held_out, plan.text.split_by)
    data = Batches(
        corpus,
        train,
        held_out,
        max_length=plan.text.max_length,
        batch_size=plan.optim.batch_size,
        micro_batch_size=plan.optim.micro_batch_size,
        seed=plan.seed,
        workers=plan.machine.workers,
        val_packs=plan.watch.val_packs,
    )
    if first:
        for line in corpus.report["lines"]:
            print(line, file=sys.stderr)
        print(f"{len(train)} sequences to train on, {len(held_out)} held out; rows filled to "
              f"{data.stream.filled():.1%}", file=sys.stderr)  # fmt: skip
    return corpus, data


def _models(plan: TrainConfig) -> tuple[Any, HFTarget | None, Any]:
    """The target's model, the target where validation decodes with it, and the draft to train."""
    from draftsmith.infer.models.hf_target import HFTarget
    from draftsmith.infer.models.load import load_model

    loaded, tokenizer = load_model(plan.target, device="cpu")
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(plan.machine.precision, torch.float32)
    model = init_draft(loaded, num_layers=plan.num_layers, how=plan.init, shape=plan.shape, seed=plan.seed, dtype=dtype)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", plan.text.max_length)
    if plan.text.max_length > longest:
        raise ValueError(f"max_length {plan.text.max_length} is beyond the target's {longest} positions")
    freeze(model, plan.freeze)
    if plan.lora_rank:
        add_lora(model, plan.lora_rank, plan.seed)
    if plan.machine.gradient_checkpointing:
        # transformers gave the method a new name, and will drop the old one.
        new = getattr(model, "activation_checkpointing_enable", None)
        (new or model.gradient_checkpointing_enable)({"use_reentrant": False})
    if plan.machine.compile:
        for layer in find_parts(model).layers:
            layer.compile()
    wanted = plan.watch.val_prompts and plan.text.held_out and rank() == 0
    target = HFTarget(loaded.to(plan.machine.device), tokenizer) if wanted else None
    return loaded, target, model.train()


def _tell_memory(plan: TrainConfig, model: Any, exits: list[int], first: bool) -> None:
    parts = memory_estimate(
        model,
        positions=plan.optim.micro_batch_size * plan.text.max_length,
        num_exits=len(exits),
        optimiser=plan.optim.name,
        width=4 if plan.machine.precision == "32-true" else 2,
        checkpointing=plan.machine.gradient_checkpointing,
        shards=shards_of(plan.strategy, plan.world),
        cuda=plan.machine.device == "cuda",
    )
    if first:
        told = ", ".join(f"{name} {size:.2f}" for name, size in parts.items() if name != "total")
        print(f"memory per device, estimated: {parts['total']:.2f} GiB ({told})", file=sys.stderr)


def _validate(plan: TrainConfig, data: Batches, target: HFTarget | None, model: Any, exits: list[int]) -> Any:
    longest = min(plan.text.max_length, target.max_positions if target else 0) - plan.watch.val_new_tokens
    prompts = held_out_prompts(data.corpus, data.held_out, plan.watch.val_prompts, longest) if target else []

    def validate(module: Training) -> dict[str, Any]:
        losses = held_out_losses(module, data)
        found: dict[str, Any] = {"losses": losses} if losses else {}
        if target is not None and prompts:
            lengths = accepted_lengths(
                target, model, exits, prompts,
                max_new_tokens=plan.watch.val_new_tokens, num_draft_tokens=plan.watch.num_draft_tokens,
            )  # fmt: skip
            found |= {f"accepted_length_exit_{exit}": round(n, 4) for exit, n in zip(exits, lengths)}
        module.trainer.strategy.barrier()
        return found

    return validate


def fit(
    plan: TrainConfig, module: Training, data: Batches, watcher: AtSteps, record: RunRecord, max_steps: int | None
) -> None:
    """Train to `max_steps`, from the newest state where there is one."""
    newest = record.newest_state()
    if newest is not None and rank() == 0:
        print(f"going on from {newest.name}", file=sys.stderr)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # Lightning's advice on what is settled here: devices left idle, few workers, the number of logged steps.
        warnings.filterwarnings("ignore", module="lightning.*")
        warnings.filterwarnings("ignore", message=".*find_unused_parameters.*")
        watcher.trainer = make_trainer(plan, module, watcher, record, max_steps or ENDLESS)
        try:
            watcher.trainer.fit(module, datamodule=data, ckpt_path=newest)
        except OSError as error:
            raise ValueError(
                f"{record.path}: {error.strerror or error}; run the same command again to go on"
            ) from error
        except SystemExit as stop:
            # Lightning's answer to Ctrl-C, after which it lets no other through.
            if not watcher.trainer.interrupted:
                raise
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt("run the same command again to go on from the last state that was kept") from stop
