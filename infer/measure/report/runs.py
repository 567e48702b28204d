"""The run folders that a report is about: read, checked, ordered, and every runner in them given one name.

A report is about one target. Its runs differ in batch size and temperature; what else differs between them is told, not
hidden. What is made of the figures is not known here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.infer.drafters.registry import Spec, parse_spec, split_outside_brackets
from draftsmith.infer.measure.run_folder import RunFolder

# Runs of one report may differ in these and still be read side by side.
EXPECTED_TO_DIFFER = {"batch_size", "temperature", "drafters", "peers", "out", "json", "repeats", "warmup"}


@dataclass(slots=True)
class ReportedRun:
    """One run folder. `specs` are the drafters as they were written, by label; `names` how each runner is shown.

    `label` tells the run from all others of the report, `place` from those of its own temperature.
    """

    path: Path
    facts: dict[str, Any]
    results: dict[str, Any]
    specs: dict[str, tuple[str, Spec]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    label: str = ""
    place: str = ""

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.facts.get("config") or {})

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.path)

    @property
    def target(self) -> str:
        return str(self.config.get("target") or "")

    @property
    def temperature(self) -> float:
        sampling = self.facts.get("sampling") or {}
        return float(sampling.get("temperature", self.config.get("temperature", 0.0)))

    @property
    def batch_size(self) -> int:
        return int(self.results["batch_size"])

    @property
    def baseline(self) -> str:
        return str(self.results["baseline"])

    @property
    def left_out(self) -> set[str]:
        return {str(question_id) for question_id in self.results["left_out"]["ids"]}

    def spec(self, label: str) -> str:
        """The drafter as it was written on the command line; a runner that was not written there is its label."""
        return self.specs[label][0] if label in self.specs else label


def read_runs(paths: Sequence[str | Path]) -> list[ReportedRun]:
    """All runs, smallest temperature and batch first."""
    if not paths:
        raise ValueError("give one run folder or more, such as runs/first: what `draftsmith bench --out` wrote")
    distinct = {Path(path).resolve(): Path(path) for path in paths}
    runs = [_read(path) for path in distinct.values()]
    targets = sorted({run.target for run in runs})
    if len(targets) > 1:
        raise ValueError(f"a report is about one target, and these runs have {', '.join(targets)}")
    runs.sort(key=lambda run: (run.temperature, run.batch_size))
    _label(runs)
    _name(runs)
    return runs


def _read(path: Path) -> ReportedRun:
    facts, results = (_json(path, name) for name in ("run.json", "results.json"))
    missing = {"drafters", "baseline", "batch_size", "left_out"} - set(results)
    if missing:
        raise ValueError(f"{path / 'results.json'} is no benchmark's: it lacks {', '.join(sorted(missing))}")
    if results["baseline"] not in results["drafters"]:
        raise ValueError(f"{path / 'results.json'} has no figures of {results['baseline']!r}, its own baseline")
    run = ReportedRun(path, facts, results)
    run.specs = _specs(str(run.config.get("drafters") or ""))
    return run


def _json(path: Path, name: str) -> dict[str, Any]:
    file = path / name
    if not file.is_file():
        raise ValueError(f"{path} is no finished run folder: it has no {name}")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} does not hold one JSON object")
    return value


def _specs(text: str) -> dict[str, tuple[str, Spec]]:
    """Label -> (as written, taken apart), with the labels that the loader gives: a second `small` is small-2."""
    found: dict[str, tuple[str, Spec]] = {}
    for written in split_outside_brackets(text):
        spec = parse_spec(written)
        label = spec.label or (Path(spec.name).stem if spec.is_file else spec.name)
        candidate, count = label, 1
        while candidate in found:
            count += 1
            candidate = f"{label}-{count}"
        found[candidate] = (written, spec)
    return found


def _label(runs: list[ReportedRun]) -> None:
    """A run is told by its batch size, by its temperature where there are several, and by its folder at last."""
    several = len({run.temperature for run in runs}) > 1
    for run in runs:
        settings = (run.temperature, run.batch_size)
        twins = sum((other.temperature, other.batch_size) == settings for other in runs) > 1
        folder = f", {run.path.name}" if twins else ""
        run.place = f"batch {run.batch_size}{folder}"
        run.label = f"batch {run.batch_size}" + (f", temperature {run.temperature:g}" if several else "") + folder


def _name(runs: list[ReportedRun]) -> None:
    """One name for one drafter in all runs: its label, or what was written where one label stands for several."""
    for run in runs:
        for label in run.results["drafters"]:
            written = {other.spec(label) for other in runs if label in other.results["drafters"]}
            run.names[label] = label if len(written) == 1 else run.spec(label)
    before = [dict(run.names) for run in runs]
    for run, own in zip(runs, before):
        settings = (run.temperature, run.batch_size)
        beside = [
            names
            for other, names in zip(runs, before)
            if other is not run and (other.temperature, other.batch_size) == settings
        ]
        for label, name in own.items():
            if label != run.baseline and any(name in names.values() for names in beside):
                run.names[label] = f"{name} in {run.path.name}"


def other_settings(runs: Sequence[ReportedRun]) -> dict[str, list[str]]:
    """Setting -> its values, where runs differ in more than a report expects them to; the machine is a setting."""
    described = [
        {key: str(value) for key, value in run.config.items() if key not in EXPECTED_TO_DIFFER}
        | {"machine": machine(run.facts), "questions": str(run.results.get("questions"))}
        for run in runs
    ]
    keys = list(dict.fromkeys(key for one in described for key in one))
    values = {key: list(dict.fromkeys(one.get(key, "not set") for one in described)) for key in keys}
    return {key: several for key, several in values.items() if len(several) > 1}


def machine(facts: dict[str, Any]) -> str:
    """The hardware in a few words."""
    hardware = facts.get("hardware") or {}
    gpus = [str(gpu.get("name")) for gpu in hardware.get("gpus") or []]
    on_gpu = gpus and str((facts.get("config") or {}).get("device", "auto")) != "cpu"
    if on_gpu:
        return gpus[0] if len(gpus) == 1 else f"{len(gpus)} x {gpus[0]}"
    cpu = hardware.get("cpu") or {}
    cores = cpu.get("cores_usable") or cpu.get("cores")
    return f"{cpu.get('model') or 'unknown CPU'}" + (f", {cores} cores" if cores else "")
