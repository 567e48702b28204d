"""The folder of a training run: run.json, metrics.csv, the newest checkpoint, and at the end the model itself.

    run.json            command and settings, max_steps, data, results; `state` is running or finished
    metrics.csv         one row per step and per validation
    resume/step-N.ckpt  the newest checkpoint, deleted when the run has finished
    start/              the random model that `train target` starts from, deleted too

Every file is complete or absent.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.infer.files.atomic import write_json, written_beside
from draftsmith.train.drafts.trainable import Curves

if TYPE_CHECKING:
    import lightning

# Settings that may change when a run resumes: they affect its speed, not its result.
FREE = {"workers", "save_every", "loggers", "cache", "ray", "ray_workers"}
# Those of its ranks may change too, if every rank reads the same checkpoint.
RANKS = {"devices", "num_nodes", "micro_batch_size"}
# Strategies that read the same checkpoints.
ALIKE = ({"auto", "ddp"}, {"fsdp", "fsdp_cpu_offload"})


@dataclass(frozen=True, slots=True)
class RunRecord:
    path: Path

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    def read(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(self.run_json.read_text(encoding="utf-8"))
        return facts

    def open(self, facts: dict[str, Any], first: bool = True) -> dict[str, Any]:
        """The run.json of the run to resume, or `facts` for a new run, whose folder is created.

        run.json itself is written by `begin`, once the options have been checked. Only the first rank writes.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file: give a folder for the run")
        if self.run_json.is_file():
            before = self.read()
            if before.get("state") == "finished":
                raise ValueError(f"{self.path} holds a finished run: give a new folder")
            self._same(before.get("settings", {}), facts["settings"])
            return before
        if not first:
            return facts
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if any(path.name != "start" for path in self.path.iterdir()):
                raise ValueError(f"{self.path} is not empty and holds no run to resume: give a new folder")
            (self.path / ".part").touch()
            (self.path / ".part").unlink()
        except OSError as error:
            raise ValueError(f"{self.path} cannot be written to: {error.strerror}") from error
        return facts

    def _same(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        before, now = _flat(before), _flat(json.loads(json.dumps(now)))
        strategies = {before.get("strategy"), now.get("strategy")}
        split = any(str(name).startswith("deepspeed") for name in strategies)
        free = (
            FREE if split else FREE | RANKS | ({"strategy"} if any(strategies <= alike for alike in ALIKE) else set())
        )
        other = [key for key in now if key.split(".")[-1] not in free and before.get(key) != now[key]]
        if split and other and RANKS.issuperset(key.split(".")[-1] for key in other):
            changed = ", ".join(f"--{key} {before.get(key)}" for key in other)
            raise ValueError(
                f"{self.path}: DeepSpeed's checkpoints resume only on the ranks that wrote them: give {changed}, or "
                "start over with ddp or fsdp"
            )
        if other:
            listed = ", ".join(f"{key} ({before.get(key)!r}, now {now[key]!r})" for key in other)
            raise ValueError(f"{self.path} holds a run that was started with other settings: {listed}")

    def begin(self, facts: dict[str, Any]) -> None:
        write_json(self.run_json, facts)

    def update(self, **facts: Any) -> None:
        write_json(self.run_json, {**self.read(), **facts})

    def newest_state(self) -> Path | None:
        """The newest checkpoint."""
        states = (self.path / "resume").glob("step-*.ckpt")
        return max(states, key=state_step, default=None)

    def state_path(self, step: int) -> Path:
        return self.path / "resume" / f"step-{step:08d}.ckpt"

    def clean(self) -> None:
        for name in ("resume", "start"):
            shutil.rmtree(self.path / name, ignore_errors=True)


def state_step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def save_state(trainer: lightning.Trainer, record: RunRecord, step: int) -> None:
    """Write the state beside its place, rename it, and delete the one before it. Called on all ranks."""
    path = record.state_path(step)
    before = record.newest_state()
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(exist_ok=True)
        if trainer.is_global_zero:
            _remove(part)  # of a run that was killed, on other ranks perhaps
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


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        nested = isinstance(value, dict) and key != "template_kwargs"
        flat.update(_flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat


class Metrics:
    """metrics.csv, one row at a time. Numbers read back exactly."""

    def __init__(self, path: Path, curves: Curves) -> None:
        self.path = path
        self.columns = [
            "step", "kind", "loss", *curves.losses, *curves.lengths,
            "lr", "grad_norm", "loss_tokens", "loss_tokens_per_s", "seconds",
        ]  # fmt: skip

    def begin(self, step: int) -> None:
        """Drop the rows after `step`, from which the run resumes."""
        kept = [row for row in self.rows() if int(row["step"]) <= step] if step else []
        with written_beside(self.path) as text:
            writer = csv.DictWriter(text, self.columns)
            writer.writeheader()
            writer.writerows(kept)

    def add(self, **values: Any) -> None:
        with self.path.open("a", encoding="utf-8", newline="") as text:
            csv.DictWriter(text, self.columns, restval="").writerow(values)
            text.flush()
            os.fsync(text.fileno())

    def rows(self) -> list[dict[str, str]]:
        """All complete rows, without a last one cut off by a kill."""
        if not self.path.is_file():
            return []
        with self.path.open(encoding="utf-8", newline="") as text:
            rows = list(csv.DictReader(text))
        return [row for row in rows if row.get("kind") in ("train", "held_out") and row["seconds"] is not None]


def draw_curves(metrics: Metrics, path: Path, curves: Curves) -> None:
    """Losses and accepted_length over the steps."""
    from matplotlib.figure import Figure

    rows = metrics.rows()
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for colour, (number, name) in enumerate(zip(curves.numbers, curves.losses)):
        for kind, style in (("train", {"linewidth": 0.8, "alpha": 0.5}), ("held_out", {"marker": "o"})):
            label = f"{curves.word} {number}, {kind.replace('_', '-')}"
            left.plot(*_column(rows, kind, name), color=f"C{colour}", label=label, **style)
    for name in curves.lengths:
        label = name.removeprefix("accepted_length").strip("_").replace("_", " ") or "draft"
        right.plot(*_column(rows, "held_out", name), marker="o", label=label)
    left.set(xlabel="step", ylabel="loss (nats per token)")
    right.set(xlabel="step", ylabel="accepted_length (held-out prompts)")
    left.legend(fontsize="small")
    right.legend(fontsize="small")
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png", dpi=120)
    os.replace(part, path)


def _column(rows: list[dict[str, str]], kind: str, name: str) -> tuple[list[int], list[float]]:
    points = [(int(row["step"]), float(row[name])) for row in rows if row["kind"] == kind and row[name]]
    return [x for x, _ in points], [y for _, y in points]
