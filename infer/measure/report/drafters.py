"""What a report says about a drafter besides its figures: its cost to make, the memory it adds, where it runs.

Cost and size are read from the drafter's folder: run.json of a training, store.json of a store. The entries of the
registry of short names may have `control: true` and `elsewhere: {engine: command to copy}`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.infer.drafters.registry import Registry
from draftsmith.infer.measure.report.runs import ReportedRun


@dataclass(frozen=True, slots=True)
class About:
    """`kind` is plain, drafter, control or peer; `made` and `adds` are text; `elsewhere` maps engines to commands."""

    kind: str
    written: str
    made: str = ""
    adds: str = ""
    runs: tuple[str, ...] = ("here",)
    elsewhere: dict[str, str] = field(default_factory=dict)


def about(run: ReportedRun, label: str, registry: Registry) -> About:
    """What is known about one runner."""
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
    if spec.parts:
        costs = [(part.name, *_cost(part.argument)) for part in spec.parts if part.argument]
        made, adds = ("; ".join(f"{name}: {one[at]}" for name, *one in costs) or "nothing" for at in (0, 1))
        return About("drafter", written, made, adds)
    made, adds = _cost(spec.argument) if spec.argument else ("nothing to make", "nothing")
    if spec.is_file:
        made, adds = f"not recorded: see {spec.name}", "not recorded"
    elsewhere = {
        engine: line.replace("{target}", run.target).replace("{argument}", spec.argument)
        for engine, line in (entry.get("elsewhere") or {}).items()
    }
    return About("drafter", written, made, adds, ("here", *elsewhere), elsewhere)


def _cost(argument: str) -> tuple[str, str]:
    """(cost to make, memory added) of a model or a store in a folder."""
    folder = Path(argument).expanduser()
    if not folder.is_dir():
        return "unknown: its folder is not on this machine", "unknown"
    store = _json(folder / "store.json")
    if store is not None:
        size = _size(path for path in folder.rglob("*") if path.is_file())
        return _store_cost(store), f"{size} store"
    weights = [path for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind)]
    record = _json(folder / "run.json")
    return _training_cost(record), f"{_size(weights)} weights" if weights else "unknown"


def _store_cost(store: dict[str, Any]) -> str:
    seconds = (store.get("build") or {}).get("seconds")
    counts = store.get("counts") or {}
    held = counts.get("tokens") or store.get("keys")
    what = f"a store of {held:,} tokens" if held else "a store"
    return f"{what}, built in {duration(float(seconds))}" if seconds is not None else f"{what}; time not recorded"


def _training_cost(record: dict[str, Any] | None) -> str:
    if record is None or record.get("train_seconds") is None:
        return "cost not recorded"
    steps = f", {record['max_steps']} steps" if record.get("max_steps") else ""
    return f"trained in {duration(float(record['train_seconds']))}{steps}"


def _json(path: Path) -> dict[str, Any] | None:
    """A record; None if it is missing or unreadable, which does not stop a report."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _size(paths: Iterable[Path]) -> str:
    return size_text(sum(path.stat().st_size for path in paths))


def size_text(count: float) -> str:
    """Bytes in decimal units, as disks and model hubs give them."""
    units = ["B", "kB", "MB", "GB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.0f} {units[0]}" if count >= 10 or units[0] == "B" else f"{count:.1f} {units[0]}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 2 else f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
