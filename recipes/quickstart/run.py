"""`draftsmith quickstart`: trains a target and drafts, builds stores, and writes a page that compares them.

Finished steps are skipped, a killed one resumes, and one whose settings or inputs changed starts over. To tell these
apart, `steps/` in the output folder has one file per step: its command, the version of each input it read, and whether
it finished.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from draftsmith.infer.files.locations import check_writable
from draftsmith.recipes.cli.ranges import IntFrom0
from draftsmith.recipes.quickstart.steps import SCALES, QuickstartPlan, Step

# `machine_seconds` on the machine where the steps' seconds were measured.
REFERENCE_SECONDS = 0.31


def quickstart(
    scale: Literal["smoke", "small", "full"] | None = None, out: str | None = None, seed: IntFrom0 = 0
) -> None:
    """Train a small target and drafts for it, build stores, and compare every drafter; no downloads, no GPU.

    The text is Python's own standard library. Each step is a `draftsmith` command, printed as it runs. Interrupt it at
    any time: the same command resumes, and skips the steps that are finished.

    Example: draftsmith quickstart --scale smoke

    Args:
        scale: smoke (a minute), small (about fifteen minutes) or full (about an hour); by default that of the
            environment variable SCALE, else small.
        out: the output folder; quickstart/SCALE by default.
        seed: random seed for the text's order, training and measuring.
    """
    chosen = scale or os.environ.get("SCALE") or "small"
    if chosen not in SCALES:
        raise ValueError(f"the environment variable SCALE takes {' or '.join(SCALES)}, not {chosen!r}")
    size = SCALES[chosen]
    folder = Path(out or f"quickstart/{chosen}")
    check_writable(folder, folder=True)
    print(f"quickstart, scale {chosen}: {size.says}; output folder {folder}")
    print("Interrupt it whenever you like: the same command resumes where it stopped.\n")
    began = time.perf_counter()
    steps = QuickstartPlan(folder, size, seed).steps()
    made = run_steps(steps, folder, size.seconds)
    summary = (
        f"{made} of {len(steps)} steps in {time.perf_counter() - began:.0f} s"
        if made
        else "everything is there already"
    )
    print(f"{summary}\n")
    print("\n".join(_ending(folder)))


def _ending(folder: Path) -> list[str]:
    """The verdicts, the path of the report, and what these results do and do not show."""
    page = (folder / "report.md").read_text(encoding="utf-8").splitlines()
    verdicts = [line.removeprefix("## ") for line in page if line.startswith("## ")]
    target = folder / "target"
    return [
        *verdicts,
        f"report: {folder / 'report.html'}",
        "",
        "This shows that training, stores and drafting work on this machine, and that greedy output is unchanged.",
        "Drafts that are drawn give sampled text of the same distribution, not the same text. The timings do not",
        "predict an 8B model on a GPU. For that, run these with your own model, and your logs as the data:",
        f"  draftsmith plan --target {target} --acceptance 0.7",
        f"  draftsmith replay --data {folder / 'answers.jsonl'} --tokenizer {target} --drafters "
        f"pld,rest:{folder / 'store-rest-ood'}",
        "The second reads recorded answers only: it needs no target and no GPU.",
    ]


def run_steps(steps: Sequence[Step], folder: Path, seconds: Mapping[str, float]) -> int:
    """Run the steps that are not finished; returns their number. `seconds`: what each took on another machine."""
    waiting: list[str] = []
    for step in steps:
        if not {*step.needs}.isdisjoint(waiting) or not _finished(step, folder):
            waiting.append(step.name)
    pace = _Pace(seconds) if waiting else None
    for number, step in enumerate(steps, start=1):
        print(f"[{number}/{len(steps)}] {step.says}\n      {_command(step)}", flush=True)
        if pace is None or step.name not in waiting:
            print(f"      there already: {step.out}\n")
            continue
        left = waiting[waiting.index(step.name) :]
        print(f"      {pace.estimate([step.name])}; {pace.estimate(left)} for all remaining steps", flush=True)
        begun = _begin(step, folder)
        began = time.perf_counter()
        _run(step, f"step {number} of {len(steps)}")
        took = time.perf_counter() - began
        _write(step, folder, {**begun, "state": "finished", "seconds": round(took, 1)})
        pace.add(step.name, took)
        print(f"      {took:.0f} s\n", flush=True)
    return len(waiting)


def _record(name: str, folder: Path) -> dict[str, Any]:
    """The record of a step; empty if it was never begun."""
    path = folder / "steps" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write(step: Step, folder: Path, facts: dict[str, Any]) -> None:
    from draftsmith.infer.files.atomic import write_json

    write_json(folder / "steps" / f"{step.name}.json", facts)


def _decided_by(step: Step, folder: Path) -> dict[str, Any]:
    """What determines a step's output: its words, with the folder's name left out, and the version of its inputs."""
    words = [word.replace(str(folder), "OUT") for word in step.words]
    return {"words": words, "reads": {name: _record(name, folder).get("made") for name in step.needs}}


def _same(before: dict[str, Any], now: dict[str, Any]) -> bool:
    return all(before.get(name) == value for name, value in now.items())


def _finished(step: Step, folder: Path) -> bool:
    """Whether the step is finished with today's settings, even if it was killed just before that was recorded."""
    before = _record(step.name, folder)
    if not _same(before, _decided_by(step, folder)) or not (step.proof or step.out).exists():
        return False
    return before["state"] == "finished" or step.proof is not None


def _begin(step: Step, folder: Path) -> dict[str, Any]:
    """Remove output that cannot be resumed and record the step as begun; returns the record."""
    before, now = _record(step.name, folder), _decided_by(step, folder)
    there = [path for path in _places(step) if path.exists()]
    if there and not before:
        raise ValueError(f"{there[0]} exists and is not the quickstart's: give another --out, or remove it")
    same = _same(before, now)
    kept = same and before["state"] == "begun" and _can_resume(step)
    if there and kept:
        print("      resuming")
    elif there:
        why = "incomplete" if same else "made with other settings or inputs"
        print(f"      {why}: starting over")
    for path in [] if kept else there:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    begun = {**now, "made": before["made"] if kept else f"{time.time_ns():x}", "state": "begun"}
    _write(step, folder, begun)
    return begun


def _can_resume(step: Step) -> bool:
    """Whether the command can resume; a run folder without run.json holds nothing yet."""
    return step.resumes and (not step.out.is_dir() or (step.out / "run.json").is_file())


def _places(step: Step) -> list[Path]:
    """The output, its proof, and the files beside it in which commands keep unfinished work and settings."""
    beside = [step.out.with_name(step.out.name + more) for more in (".part", ".run.json")]
    return list(dict.fromkeys([*([step.proof] if step.proof else []), step.out, *beside]))


def _command(step: Step) -> str:
    return "(this command itself)" if step.make else f"draftsmith {shlex.join(step.words)}"


def _run(step: Step, which: str) -> None:
    from draftsmith.recipes.cli.main import run

    if step.make is not None:
        print(f"      {step.make()}")
        return
    with _as_typed(step.words):
        code = run(step.words)
    if code == 130:
        raise KeyboardInterrupt("run the same command again to resume here")
    if code:
        raise ValueError(f"{which} failed; see the line above")


@contextmanager
def _as_typed(words: Sequence[str]) -> Iterator[None]:
    """Set sys.argv to the step's command, which its run folder records."""
    before, sys.argv = sys.argv, ["draftsmith", *words]
    try:
        yield
    finally:
        sys.argv = before


class _Pace:
    """Estimates of time: the reference seconds, scaled to this machine and corrected by the finished steps."""

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self._reference = seconds
        self._guess = machine_seconds() / REFERENCE_SECONDS
        self._expected = self._took = 0.0

    def estimate(self, names: Sequence[str]) -> str:
        # The first guess weighs as much as ten expected seconds of finished steps.
        ratio = (self._took + 10 * self._guess) / (self._expected + 10)
        seconds = ratio * sum(self._reference.get(name, 0.0) for name in names)
        if seconds < 5:
            return "a few seconds"
        return f"about {seconds:.0f} s" if seconds < 100 else f"about {seconds / 60:.0f} min"

    def add(self, name: str, took: float) -> None:
        self._expected += self._reference.get(name, 0.0)
        self._took += took


def machine_seconds() -> float:
    """Time for matrix products of a small model's size on this machine."""
    import torch

    states, weights = torch.randn(4096, 256), torch.randn(256, 704)
    times = []
    for _ in range(4):  # the first warms up
        began = time.perf_counter()
        for _ in range(20):
            states @ weights
        times.append(time.perf_counter() - began)
    return min(times)
