"""Running the quickstart's steps: what is there is passed over, what was killed goes on, what changed is made anew.

Beside the outputs, in `steps/`, a file per step says with which settings it was begun and whether it was finished. The
settings are the command's words and, in turn, those of all steps that it reads; so an output of other settings is never
taken for this one. What the steps do is not known here.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from draftsmith.recipes.quickstart_steps import Step

# What `machine_seconds` took where the steps' seconds were measured.
REFERENCE_SECONDS = 0.25


def run_steps(steps: Sequence[Step], folder: Path, seconds: Mapping[str, float]) -> int:
    """Run what is not there yet; returns how many steps that were. `seconds`: what each took elsewhere."""
    keys = keys_of(steps, folder)
    waiting = [step for step in steps if not _finished(step, folder, keys[step.name])]
    pace = _Pace(seconds) if waiting else None
    for number, step in enumerate(steps, start=1):
        print(f"[{number}/{len(steps)}] {step.says}\n      {_command(step)}", flush=True)
        if pace is None or step not in waiting:
            print(f"      there already: {step.out}\n")
            continue
        left = [one.name for one in waiting[waiting.index(step) :]]
        print(f"      {pace.told(step.name)}, {pace.told(*left)} for all that is left", flush=True)
        _make_room(step, folder, keys[step.name])
        began = time.perf_counter()
        _run(step, f"step {number} of {len(steps)}")
        took = time.perf_counter() - began
        _write(step, folder, key=keys[step.name], state="finished", seconds=round(took, 1), words=step.words)
        pace.add(step.name, took)
        print(f"      {took:.0f} s\n", flush=True)
    return len(waiting)


def keys_of(steps: Sequence[Step], folder: Path) -> dict[str, str]:
    """Per step what decides its output: its words and the keys of what it reads. The folder's own name does not."""
    keys: dict[str, str] = {}
    for step in steps:
        words = [word.replace(str(folder), "OUT") for word in step.words]
        what = json.dumps([step.name, words, [keys[name] for name in step.needs]])
        keys[step.name] = hashlib.sha256(what.encode()).hexdigest()[:16]
    return keys


def _record(step: Step, folder: Path) -> Path:
    return folder / "steps" / f"{step.name}.json"


def _read(step: Step, folder: Path) -> dict[str, Any]:
    path = _record(step, folder)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write(step: Step, folder: Path, **facts: Any) -> None:
    from draftsmith.infer.measure.atomic import write_json

    write_json(_record(step, folder), facts)


def _finished(step: Step, folder: Path, key: str) -> bool:
    """Finished with these settings; also where a kill came between the output's last file and ours."""
    before = _read(step, folder)
    proof = step.out if step.proof is None else step.proof
    if before.get("key") != key or not proof.exists():
        return False
    return before["state"] == "finished" or step.proof is not None


def _make_room(step: Step, folder: Path, key: str) -> None:
    """Take away what cannot be gone on from, and note what is begun now."""
    before = _read(step, folder)
    there = [path for path in _places(step) if path.exists()]
    if there and not before:
        raise ValueError(f"{there[0]} is there and is not the quickstart's: give another --out, or take it away")
    changed = before.get("key", key) != key
    if changed:
        print(f"      {step.out.name} was made with other settings, and is made anew")
    elif there:
        print("      it goes on where it was" if step.resumes else "      it was interrupted, and begins anew")
    if changed or not step.resumes or before.get("state") == "finished":
        for path in there:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    _write(step, folder, key=key, state="begun", words=step.words)


def _places(step: Step) -> list[Path]:
    """The output, and where commands keep what is not finished, or its settings."""
    return [step.out, *(step.out.with_name(step.out.name + more) for more in (".part", ".run.json"))]


def _command(step: Step) -> str:
    return "(this command itself)" if step.make else f"draftsmith {shlex.join(step.words)}"


def _run(step: Step, which: str) -> None:
    from draftsmith.recipes.cli import run

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

    def told(self, *names: str) -> str:
        # Ten seconds of what was expected weigh as much as ten that were seen.
        ratio = (self._took + 10 * self._guess) / (self._expected + 10)
        seconds = ratio * sum(self._elsewhere.get(name, 0.0) for name in names)
        return f"about {seconds:.0f} s" if seconds < 100 else f"about {seconds / 60:.0f} min"

    def add(self, name: str, took: float) -> None:
        self._expected += self._elsewhere.get(name, 0.0)
        self._took += took


def machine_seconds() -> float:
    """What some products of a small model's size take here, in the dtype that it runs in."""
    import torch

    states, weights = torch.randn(4096, 256).bfloat16(), torch.randn(256, 704).bfloat16()
    times = []
    for _ in range(4):  # the first one warms up
        began = time.perf_counter()
        for _ in range(20):
            states @ weights
        times.append(time.perf_counter() - began)
    return min(times)
