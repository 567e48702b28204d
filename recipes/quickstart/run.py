"""Running the quickstart's steps: what is there is passed over, what was killed goes on, what changed is made anew.

Beside the outputs, in `steps/`, a file per step says how it was begun (the command's words, and which making of each
earlier step it reads) and whether it was finished. So an output of other settings, or of inputs that have been made
again since, is never taken for this one. What the steps do is not known here.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from draftsmith.recipes.quickstart.steps import Step

# What `machine_seconds` took where the steps' seconds were measured.
REFERENCE_SECONDS = 0.31


def run_steps(steps: Sequence[Step], folder: Path, seconds: Mapping[str, float]) -> int:
    """Run what is not there yet; returns how many steps that were. `seconds`: what each took elsewhere."""
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
        print(f"      {pace.told([step.name])}; {pace.told(left)} for all that is left", flush=True)
        begun = _begin(step, folder)
        began = time.perf_counter()
        _run(step, f"step {number} of {len(steps)}")
        took = time.perf_counter() - began
        _write(step, folder, {**begun, "state": "finished", "seconds": round(took, 1)})
        pace.add(step.name, took)
        print(f"      {took:.0f} s\n", flush=True)
    return len(waiting)


def _record(name: str, folder: Path) -> dict[str, Any]:
    """What is known of a step that was begun; nothing of one that was not."""
    path = folder / "steps" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write(step: Step, folder: Path, facts: dict[str, Any]) -> None:
    from draftsmith.infer.files.atomic import write_json

    write_json(folder / "steps" / f"{step.name}.json", facts)


def _decided_by(step: Step, folder: Path) -> dict[str, Any]:
    """What decides a step's output: its words, the folder's own name apart, and which making of its inputs it reads."""
    words = [word.replace(str(folder), "OUT") for word in step.words]
    return {"words": words, "reads": {name: _record(name, folder).get("made") for name in step.needs}}


def _same(before: dict[str, Any], now: dict[str, Any]) -> bool:
    return all(before.get(name) == value for name, value in now.items())


def _finished(step: Step, folder: Path) -> bool:
    """Finished as it would be now; also where a kill came between the output's last file and our own."""
    before = _record(step.name, folder)
    if not _same(before, _decided_by(step, folder)) or not (step.proof or step.out).exists():
        return False
    return before["state"] == "finished" or step.proof is not None


def _begin(step: Step, folder: Path) -> dict[str, Any]:
    """Take away what cannot be gone on from, and note what is begun now; returns the note."""
    before, now = _record(step.name, folder), _decided_by(step, folder)
    there = [path for path in _places(step) if path.exists()]
    if there and not before:
        raise ValueError(f"{there[0]} is there and is not the quickstart's: give another --out, or take it away")
    same = _same(before, now)
    kept = same and before["state"] == "begun" and _goes_on(step)
    if there and kept:
        print("      it goes on where it was")
    elif there:
        why = "it is not whole" if same else "it was made with other settings, or of other inputs"
        print(f"      {why}: begun anew")
    for path in [] if kept else there:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    begun = {**now, "made": before["made"] if kept else f"{time.time_ns():x}", "state": "begun"}
    _write(step, folder, begun)
    return begun


def _goes_on(step: Step) -> bool:
    """Whether the command finds something to go on from; a run folder without a run.json holds nothing yet."""
    return step.resumes and (not step.out.is_dir() or (step.out / "run.json").is_file())


def _places(step: Step) -> list[Path]:
    """The output and its proof, and where commands keep what is not finished, or its settings."""
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
        raise KeyboardInterrupt("run the same command again and it goes on here")
    if code:
        raise ValueError(f"{which} failed; the line above says why")


@contextmanager
def _as_typed(words: Sequence[str]) -> Iterator[None]:
    """Run folders say which command made them: the step's, not ours."""
    before, sys.argv = sys.argv, ["draftsmith", *words]
    try:
        yield
    finally:
        sys.argv = before


class _Pace:
    """How long steps take on this machine: what they took elsewhere, times what a moment's work takes here; from the
    first long step on, times what the finished ones took."""

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self._elsewhere = seconds
        self._guess = machine_seconds() / REFERENCE_SECONDS
        self._expected = self._took = 0.0

    def told(self, names: Sequence[str]) -> str:
        # Ten seconds of what was expected weigh as much as ten that were seen.
        ratio = (self._took + 10 * self._guess) / (self._expected + 10)
        seconds = ratio * sum(self._elsewhere.get(name, 0.0) for name in names)
        if seconds < 5:
            return "a few seconds"
        return f"about {seconds:.0f} s" if seconds < 100 else f"about {seconds / 60:.0f} min"

    def add(self, name: str, took: float) -> None:
        self._expected += self._elsewhere.get(name, 0.0)
        self._took += took


@cache
def machine_seconds() -> float:
    """What some products of a small model's size take here."""
    import torch

    states, weights = torch.randn(4096, 256), torch.randn(256, 704)
    times = []
    for _ in range(4):  # the first one warms up
        began = time.perf_counter()
        for _ in range(20):
            states @ weights
        times.append(time.perf_counter() - began)
    return min(times)
