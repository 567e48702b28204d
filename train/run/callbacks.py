"""What happens between optimiser steps: logging, validation, the time limit, checkpoints.

All of it in this order and only between steps, so that a checkpoint never falls inside an accumulation and a resumed
run repeats and misses nothing.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from draftsmith.train.run.module import Training
from draftsmith.train.run.run_record import Metrics, RunRecord

MEASURED = 8
SETTLING = 2
Validate = Callable[[Training], dict[str, Any]]


class AtSteps(Callback):
    """The callback of every run.

    Args:
        record: the run's folder.
        metrics: its metrics.csv.
        exits: the draft's exits.
        validate: measures the draft; returns columns of metrics.csv.
        val_every: steps between validations; 0: only at start and end.
        save_every: steps between checkpoints.
        deadline: end of the run on time.monotonic()'s clock; None: max_steps is already fixed.
    """

    def __init__(
        self,
        record: RunRecord,
        metrics: Metrics,
        exits: list[int],
        validate: Validate,
        *,
        val_every: int,
        save_every: int,
        deadline: float | None,
    ) -> None:
        self.record = record
        self.metrics = metrics
        self.exits = exits
        self.validate = validate
        self.val_every = val_every
        self.save_every = save_every
        self.deadline = deadline
        self.last: dict[str, Any] = {}
        self._step = 0
        self._began = 0.0
        self._durations: list[float] = []
        self._val_seconds = 0.0
        self._printed = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._step = trainer.global_step
        if trainer.is_global_zero:
            self.metrics.begin(self._step)
        if self._step == 0:
            self._run_validation(trainer, pl_module)
        self._began = time.monotonic()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        losses = pl_module.take_sums().tolist()
        seconds = time.monotonic() - self._began
        self._durations.append(seconds)
        self._log_step(trainer, pl_module, losses, int(batch["loss_tokens"]), seconds)
        if self.deadline is not None and self._step == MEASURED:
            self._fix_max_steps(trainer, pl_module)
        last = self._step >= trainer.max_steps
        if last or (self.val_every and self._step % self.val_every == 0):
            self._run_validation(trainer, pl_module)
        # A run cannot resume from a checkpoint that precedes the fixing of max_steps.
        if not last and self._step % self.save_every == 0 and (self.deadline is None or self._step >= MEASURED):
            self._save(trainer)
        self._began = time.monotonic()

    def _log_step(
        self, trainer: lightning.Trainer, module: Training, losses: list[float], tokens: int, seconds: float
    ) -> None:
        values: dict[str, Any] = {"lr": module.schedule.lr(self._step - 1), "grad_norm": module.grad_norm}
        values |= {"loss_tokens": tokens, "loss_tokens_per_s": round(tokens / seconds, 1), "seconds": round(seconds, 4)}
        self._write(trainer, "train", losses, values)
        self._print(trainer, losses, tokens)

    def _write(self, trainer: lightning.Trainer, kind: str, losses: list[float], values: dict[str, Any]) -> None:
        if not trainer.is_global_zero:
            return
        values = {**values, **{f"loss_exit_{exit}": loss for exit, loss in zip(self.exits, losses)}}
        if losses:
            values["loss"] = statistics.fmean(losses)
        self.metrics.add(step=self._step, kind=kind, **values)
        for logger in trainer.loggers:
            numbers = {f"{kind}/{name}": float(value) for name, value in values.items()}
            logger.log_metrics(numbers, step=self._step)

    def _print(self, trainer: lightning.Trainer, losses: list[float], tokens: int) -> None:
        now = time.monotonic()
        last = self._step >= trainer.max_steps
        if not trainer.is_global_zero or (now - self._printed < (1 if sys.stderr.isatty() else 10) and not last):
            return
        self._printed = now
        pace = statistics.fmean(self._durations[-50:])
        known = self.deadline is None or self._step >= MEASURED
        left = f"ETA {_clock(pace * (trainer.max_steps - self._step))}" if known else "measuring speed"
        of = f"/{trainer.max_steps}" if known else ""
        each = " ".join(f"[{exit}] {loss:.3f}" for exit, loss in zip(self.exits, losses))
        end = "\n" if last or not sys.stderr.isatty() else "\x1b[K\r"
        line = f"step {self._step}{of}  loss {each}  {tokens / pace:,.0f} learned tokens/s  {left}"
        print(line, end=end, file=sys.stderr, flush=True)

    def _run_validation(self, trainer: lightning.Trainer, module: Training) -> None:
        began = time.monotonic()
        module.eval()
        found = self.validate(module)
        module.train()
        self._val_seconds = time.monotonic() - began
        if not found:
            return
        losses = found.pop("losses", [])
        values = {**found, "seconds": round(self._val_seconds, 3)}
        self._write(trainer, "held_out", losses, values)
        self.last = {"step": self._step, **dict(zip((f"loss_exit_{exit}" for exit in self.exits), losses)), **found}
        if trainer.is_global_zero:
            each = " ".join(f"[{exit}] {loss:.3f}" for exit, loss in zip(self.exits, losses))
            names = {exit: f"accepted_length_exit_{exit}" for exit in self.exits}
            lengths = " ".join(f"[{exit}] {found[name]:.2f}" for exit, name in names.items() if name in found)
            line = f"step {self._step}  held-out loss {each or '-'}  accepted_length {lengths or '-'}"
            print(line, file=sys.stderr, flush=True)

    def _fix_max_steps(self, trainer: lightning.Trainer, module: Training) -> None:
        """Once, from the duration of the first steps; from then on the run is as if max_steps had been given."""
        assert self.deadline is not None
        pace = statistics.median(self._durations[SETTLING:])
        if self.val_every:
            pace += self._val_seconds / self.val_every
        left = self.deadline - time.monotonic() - self._val_seconds
        steps = trainer.strategy.broadcast(MEASURED + max(int(left / pace), 1))
        module.schedule.max_steps = steps
        trainer.fit_loop.epoch_loop.max_steps = steps
        if trainer.is_global_zero:
            self.record.update(max_steps=steps, seconds_per_step=round(pace, 4))

    def _save(self, trainer: lightning.Trainer) -> None:
        path = self.record.state_path(self._step)
        before = self.record.newest_state()
        part = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(exist_ok=True)
            trainer.save_checkpoint(part)
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                part.replace(path)
        except (OSError, RuntimeError) as error:
            _remove(part)
            kept = f"the last good one is {before.name}" if before else "there is no earlier one"
            reason = _reason(error)
            raise ValueError(
                f"{path}: the checkpoint of step {self._step} could not be written ({reason}); {kept}. "
                "Free some space and run the same command again to resume"
            ) from error
        if before is not None and trainer.is_global_zero:
            _remove(before)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _reason(error: BaseException) -> str:
    """The system's own error, which torch wraps in one about a truncated file."""
    at: BaseException | None = error
    while at is not None and not (isinstance(at, OSError) and at.strerror):
        at = at.__cause__ or at.__context__
    return at.strerror if isinstance(at, OSError) and at.strerror else (str(error).splitlines() or [""])[0]


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
