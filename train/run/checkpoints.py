"""Writes the state that a run resumes from: beside its place, then renamed; the one before it is deleted afterwards."""

from __future__ import annotations

import shutil
from pathlib import Path

import lightning

from draftsmith.train.run.run_record import RunRecord


def save_state(trainer: lightning.Trainer, record: RunRecord, step: int) -> None:
    """Called on all ranks."""
    path = record.state_path(step)
    before = record.newest_state()
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
            f"{path}: the checkpoint of step {step} could not be written ({reason}); {kept}. "
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
