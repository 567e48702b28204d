"""What a reader has to know of a drafter besides its figures: what it cost to make, what it adds, where else it runs.

Cost and size are read where the drafter's folder lies: run.json of a training, store.json of a store. What is not
there is said not to be there. Which drafters there are is not known here: the caller brings the registry of short
names, whose entries may say `control: true` and `elsewhere: {engine: the line to copy}`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.infer.drafters.registry import Registry
from draftsmith.infer.measure.report.runs import ReportedRun

HERE = "here"


@dataclass(frozen=True, slots=True)
class About:
    """`kind` is plain, drafter, control or peer; `made` and `adds` are words; `elsewhere` maps engines to lines."""

    kind: str
    written: str
    made: str = ""
    adds: str = ""
    runs: tuple[str, ...] = (HERE,)
    elsewhere: dict[str, str] = field(default_factory=dict)


def about(run: ReportedRun, label: str, registry: Registry) -> About:
    """What is known of one runner."""
    written = run.spec(label)
    if label == run.baseline:
        return About("plain", written)
    if label not in run.specs:
        if run.results["drafters"][label]["speedup_of"] != "decode":
            return About("peer", written, runs=("transformers",))
        return About("drafter", written)
    spec = run.specs[label][1]
    entry = registry.get(spec.name, {})
    if entry.get("control"):
        return About("control", written)
    made, adds = _cost(spec.argument) if spec.argument else ("nothing to make", "nothing")
    if spec.is_file:
        made, adds = f"not recorded: see {spec.name}", "not recorded"
    places = {"{target}": run.target, "{argument}": spec.argument}
    elsewhere = {engine: _filled(line, places) for engine, line in (entry.get("elsewhere") or {}).items()}
    return About("drafter", written, made, adds, (HERE, *elsewhere), elsewhere)


def _filled(line: str, places: Mapping[str, str]) -> str:
    for place, value in places.items():
        line = line.replace(place, value)
    return line


def _cost(argument: str) -> tuple[str, str]:
    """(What it cost to make, what it adds to memory) of a model or a store in a folder."""
    folder = Path(argument).expanduser()
    if not folder.is_dir():
        return "not known: its folder is not on this machine", "not known"
    store = _json(folder / "store.json")
    if store is not None:
        size = _size(path for path in folder.rglob("*") if path.is_file())
        return _store_cost(store), f"{size} store"
    weights = [path for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind)]
    record = _json(folder / "run.json")
    return _training_cost(record), f"{_size(weights)} weights" if weights else "not known"


def _store_cost(store: dict[str, Any]) -> str:
    seconds = (store.get("build") or {}).get("seconds")
    counts = store.get("counts") or {}
    held = counts.get("tokens") or store.get("keys")
    what = f"a store of {held:,} tokens" if held else "a store"
    return f"{what}, built in {duration(float(seconds))}" if seconds is not None else f"{what}; time not recorded"


def _training_cost(record: dict[str, Any] | None) -> str:
    if record is None or record.get("train_seconds") is None:
        return "making not recorded"
    steps = f", {record['max_steps']} steps" if record.get("max_steps") else ""
    return f"trained in {duration(float(record['train_seconds']))}{steps}"


def _json(path: Path) -> dict[str, Any] | None:
    """A record that may be missing; one that cannot be read is as good as missing, and no reason to stop."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _size(paths: Any) -> str:
    return size_text(sum(path.stat().st_size for path in paths))


def size_text(count: float) -> str:
    """Bytes in decimal units, as disks and model hubs give them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("the last unit takes every count")


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 2 else f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
