"""What happens between micro-batches and optimiser steps: logging, validation, the time limit, checkpoints, stopping.

Checkpoints hold the state of a finished step, never the middle of an accumulation, so a resumed run repeats and misses
nothing. `minutes` limits the time until the model is measured for the last time. max_steps is fixed once, from the
duration of the first steps, with some time to spare; if the time is over before that many steps are done, the run stops
at the next micro-batch and ends with the newest finished step. What an unfinished step has accumulated is dropped.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from draftsmith.train.drafts.trainable import Curves
from draftsmith.train.run.module import Training
from draftsmith.train.run.progress import ProgressLine, clock, say
from draftsmith.train.run.run_record import Metrics, RunRecord, save_state
from draftsmith.train.run.stops import DIVERGED, TERMINATED, Sigterm, Stopped, all_finite, diverged

# max_steps is fixed after MEASURED steps, or at the first step that ends after FIX_AFTER of the time.
MEASURED = 8
SETTLING = 2
FIX_AFTER = 0.25
# The share of the time left that the steps are planned to take.
PLANNED = 0.95
# A run of fewer steps is warned about. With a time limit the number is known after TIMED micro-batches.
FEW_STEPS = 20
TIMED = 3
GO, TIME_IS_UP, SIGTERM = 0, 1, 2
Validate = Callable[[Training], dict[str, Any]]


class AtSteps(Callback):
    """The callback of every run.

    Args:
        record: the run's folder.
        metrics: its metrics.csv.
        curves: by what losses are reported.
        validate: measures the draft; returns columns of metrics.csv.
        val_every: steps between validations; 0: only at start and end.
        save_every: steps between checkpoints.
        deadline: end of the run on time.monotonic()'s clock; None: max_steps is already fixed.
        batch_size: rows of an optimiser step, to advise a smaller one.
    """

    def __init__(
        self,
        record: RunRecord,
        metrics: Metrics,
        curves: Curves,
        validate: Validate,
        *,
        val_every: int,
        save_every: int,
        deadline: float | None,
        batch_size: int = 0,
    ) -> None:
        self.record = record
        self.metrics = metrics
        self.curves = curves
        self.validate = validate
        self.val_every = val_every
        self.save_every = save_every
        self.deadline = deadline
        self.batch_size = batch_size
        self.sigterm = Sigterm()
        self.last: dict[str, Any] = {}
        self.out_of_time = False
        self._step = 0
        self._began = 0.0
        self._training_began = 0.0
        self._micro = 0  # micro-batches of this process, and those of them in the step that is not finished
        self._micro_in_step = 0
        self._durations: list[float] = []
        self._val_seconds = 0.0
        self._fixed = deadline is None
        self._loops: dict[str, Any] = {}
        self._line = ProgressLine()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._step = trainer.global_step
        self.sigterm.install()
        if trainer.is_global_zero:
            self.metrics.begin(self._step)
        if self._step == 0:
            self._run_validation(trainer, pl_module)
        self._began = self._training_began = time.monotonic()

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._micro == 0:
            self._stop_if_asked(trainer, pl_module, time_too=False)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._micro += 1
        self._micro_in_step += 1
        if trainer.global_step != self._step:
            self._end_step(trainer, pl_module, batch)
        else:
            self._print_micro_batch(trainer)
        if self._step < trainer.max_steps:
            self._stop_if_asked(trainer, pl_module)

    def _end_step(self, trainer: lightning.Trainer, module: Training, batch: Any) -> None:
        self._step = trainer.global_step
        self._micro_in_step = 0
        self._loops = copy.deepcopy(trainer.fit_loop.state_dict())
        losses = module.take_sums().tolist()
        seconds = time.monotonic() - self._began
        self._durations.append(seconds)
        self._log_step(trainer, module, losses, int(batch["loss_tokens"]), seconds)
        if not self._fixed and (self._step == MEASURED or self._share_of_time() >= FIX_AFTER):
            self._fix_max_steps(trainer, module)
        last = self._step >= trainer.max_steps
        if last:
            self._check_weights(trainer, module)
        if last or (self.val_every and self._step % self.val_every == 0):
            self._run_validation(trainer, module)
        # A run cannot resume from a checkpoint that precedes the fixing of max_steps.
        if not last and self._step % self.save_every == 0 and self._fixed:
            self._check_weights(trainer, module)
            save_state(trainer, self.record, self._step)
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
        values = {**values, **dict(zip(self.curves.losses, losses))}
        if losses:
            values["loss"] = statistics.fmean(losses)
        self.metrics.add(step=self._step, kind=kind, **values)
        for logger in trainer.loggers:
            numbers = {f"{kind}/{name}": float(value) for name, value in values.items()}
            logger.log_metrics(numbers, step=self._step)

    def _print(self, trainer: lightning.Trainer, losses: list[float], tokens: int) -> None:
        last = self._step >= trainer.max_steps
        if not trainer.is_global_zero or not (self._line.due or last):
            return
        pace = statistics.fmean(self._durations[-50:])
        left = f"ETA {clock(pace * (trainer.max_steps - self._step))}" if self._fixed else "measuring speed"
        each = self.curves.line(losses)
        line = f"step {self._step}{self._of(trainer)}  loss {each}  {tokens / pace:,.0f} learned tokens/s  {left}"
        self._line.show(line, last)

    def _print_micro_batch(self, trainer: lightning.Trainer) -> None:
        if self._micro == 1:
            self._line.wait()
        if not trainer.is_global_zero or not self._line.due:
            return
        of = trainer.accumulate_grad_batches
        pace = self._pace_of_micro_batches()
        step = clock(pace * (of - self._micro_in_step))
        if self._fixed:
            left = f"ETA {clock(pace * ((trainer.max_steps - self._step) * of - self._micro_in_step))}"
        else:
            left = f"time left {clock(self._end() - time.monotonic())}"
        line = f"step {self._step + 1}{self._of(trainer)}  micro-batch {self._micro_in_step}/{of}"
        self._line.show(f"{line}  next step in {step}  {left}")

    def _of(self, trainer: lightning.Trainer) -> str:
        return f"/{trainer.max_steps}" if self._fixed else ""

    def _pace_of_micro_batches(self) -> float:
        """Seconds per micro-batch, of the current step or, at its beginning, of all."""
        now = time.monotonic()
        if self._micro_in_step:
            return (now - self._began) / self._micro_in_step
        return (now - self._training_began) / self._micro

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
        self.last = {"step": self._step, **dict(zip(self.curves.losses, losses)), **found}
        if trainer.is_global_zero:
            each, lengths = self.curves.line(losses), self.curves.lengths_line(found)
            say(f"step {self._step}  held-out loss {each or '-'}  accepted_length {lengths or '-'}")

    # The time limit.

    def _end(self) -> float:
        """When the steps must end, so that the last validation ends in time; it gets at most half of the time."""
        assert self.deadline is not None
        return self.deadline - min(self._val_seconds, max(self.deadline - self._training_began, 0.0) / 2)

    def _share_of_time(self) -> float:
        return (time.monotonic() - self._training_began) / max(self._end() - self._training_began, 1e-9)

    def _fix_max_steps(self, trainer: lightning.Trainer, module: Training) -> None:
        """Once, from the duration of the first steps; from then on the run is as if max_steps had been given."""
        pace = statistics.median(self._durations[SETTLING:] or self._durations)
        if self.val_every:
            pace += self._val_seconds / self.val_every
        left = PLANNED * (self._end() - time.monotonic())
        steps = trainer.strategy.broadcast(self._step + max(int(left / pace), 1))
        module.schedule.max_steps = steps
        module.schedule.measured = self._step
        trainer.fit_loop.epoch_loop.max_steps = steps
        self._fixed = True
        if trainer.is_global_zero:
            self.record.update(max_steps=steps, measured_steps=self._step, seconds_per_step=round(pace, 4))

    def _warn_of_few_steps(self, trainer: lightning.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        total = self._end() - self._training_began
        micro = total / self._pace_of_micro_batches()
        of = trainer.accumulate_grad_batches
        if micro >= FEW_STEPS * of:
            return
        fitting = rows_for_steps(self.batch_size * micro / of)
        mend = f"--optim.batch_size {fitting} or more minutes" if 0 < fitting < self.batch_size else "more minutes"
        say(f"warning: about {micro / of:.1f} optimiser steps of {self.batch_size} rows fit the time, too few to "
            f"learn from; give {mend}")  # fmt: skip

    def _stop_if_asked(self, trainer: lightning.Trainer, module: Training, time_too: bool = True) -> None:
        """The ranks agree by the largest wish of any."""
        timed = time_too and self.deadline is not None
        if timed and self._micro == TIMED:
            self._warn_of_few_steps(trainer)
        wish = SIGTERM if self.sigterm.received else TIME_IS_UP if timed and time.monotonic() >= self._end() else GO
        wish = _largest(trainer, module, wish)
        if wish == SIGTERM:
            self.sigterm.received = True
            raise Stopped("stopped by SIGTERM", TERMINATED)
        if wish == TIME_IS_UP:
            self._end_early(trainer, module)

    def _end_early(self, trainer: lightning.Trainer, module: Training) -> None:
        """End with the newest finished step. It is recorded, with the length that its learning rates were made for."""
        self.out_of_time = True
        trainer.should_stop = True
        if self._step == 0:
            return
        self._check_weights(trainer, module)
        if trainer.is_global_zero:
            self.record.update(max_steps=self._step, planned_steps=module.schedule.max_steps)
            dropped = f", {self._micro_in_step} micro-batches of the next one dropped" if self._micro_in_step else ""
            say(f"the time is over after step {self._step}{dropped}")
        if self.last.get("step") != self._step:
            self._run_validation(trainer, module)

    # Checkpoints.

    def on_save_checkpoint(self, trainer: lightning.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Lightning's counters are those of the last finished step."""
        if self._micro_in_step and self._loops:
            checkpoint["loops"]["fit_loop"] = self._loops

    def on_load_checkpoint(self, trainer: lightning.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Lightning counts micro-batches, of which a step has others on another number of ranks."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            missing = checkpoint["global_step"] * trainer.accumulate_grad_batches - counts["ready"]
            for name in counts:
                counts[name] += missing

    def on_exception(self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException) -> None:
        """After SIGTERM save the last finished step; after a loss that is not finite only if there is no state yet."""
        alone = trainer.world_size == 1
        diverged_here = isinstance(exception, Stopped) and exception.exit_code == DIVERGED
        # Only a Stopped has been raised on all ranks.
        if not isinstance(exception, Stopped) and not (self.sigterm.received and alone):
            return
        # DeepSpeed accumulates in an engine of its own, whose state is that of the micro-batch.
        inside = self._micro_in_step and type(trainer.strategy).__name__ == "DeepSpeedStrategy"
        newest = self.record.newest_state()
        if diverged_here:
            skip = newest is not None or not all_finite(pl_module.draft.parameters())
        else:
            skip = newest == self.record.state_path(self._step)
        if not self._step or inside or _largest(trainer, pl_module, skip):
            return
        if not self._fixed:
            self._fix_max_steps(trainer, pl_module)
        save_state(trainer, self.record, self._step)

    def _check_weights(self, trainer: lightning.Trainer, module: Training) -> None:
        if _largest(trainer, module, not all_finite(module.draft.parameters())):
            raise diverged(self._step, "the weights are no longer finite")


def _largest(trainer: lightning.Trainer, module: Training, value: int) -> int:
    """The largest `value` of any rank."""
    if trainer.world_size == 1:
        return value
    values = torch.tensor(float(value), device=module.device)
    return int(trainer.strategy.reduce(values, reduce_op="max"))


def rows_for_steps(rows: float) -> int:
    """The largest power of two of which FEW_STEPS fit in `rows`; 0 if not even one does."""
    each = int(rows / FEW_STEPS)
    return 1 << (each.bit_length() - 1) if each else 0
