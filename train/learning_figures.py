"""What a learning study comes to: accepted_length per kind of run and exit, and sorted training beside the others.

The seeds are pooled prompt by prompt: a prompt's committed tokens and steps are summed over the seeds, and prompts are
drawn with replacement, the same draws for both sides of a ratio. So an interval tells what other prompts would have
given, not what other seeds would have: the ratio of each seed stands beside it. Where the runs and their figures come
from is not known here.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from draftsmith.infer.measure.bootstrap import ratio_interval, speedup_interval
from draftsmith.infer.measure.metrics import ratio

LOOPING = 0.5
# (kind, seed) -> exit -> loss, committed and steps per prompt
Found = dict[tuple[str, int], dict[str, dict[str, Any]]]


def read_found(out: Path) -> tuple[Found, list[float]]:
    """What has been measured in a study's folder, finished or not; and the distinct share of plain's answers."""
    found: Found = {}
    for path in sorted((out / "measured").glob("*.json")):
        name, _, seed = path.stem.rpartition("-")
        found[name, int(seed)] = json.loads(path.read_text(encoding="utf-8"))
    plain = out / "plain.json"
    return found, json.loads(plain.read_text(encoding="utf-8"))["distinct"] if plain.is_file() else []


def summarise(found: Found, distinct: Sequence[float], exits: Sequence[int], *, seed: int = 0) -> dict[str, Any]:
    """Figures over all prompts, and over those whose plain answer does not loop."""
    every = list(range(len(distinct)))
    kept = [i for i in every if distinct[i] >= LOOPING]
    sides = {"all": every, "not_looping": kept}
    names = [name for name in _order(found, exits) if any(kind == name for kind, _ in found)]
    return {
        "prompts": {side: len(picked) for side, picked in sides.items()},
        "kinds": {name: _kind(found, name, sides, seed) for name in names},
        "comparisons": [
            _compare(found, ours, others, exit, sides, seed) for ours, others, exit in _pairs(names, exits)
        ],
    }


def _order(found: Found, exits: Sequence[int]) -> list[str]:
    plain = ["soft", "sft", *(f"sft-{exit}" for exit in exits[:-1])]
    return plain + sorted({name for name, _ in found} - set(plain))


def _pairs(names: Sequence[str], exits: Sequence[int]) -> list[tuple[str, str, int]]:
    """Every sorted kind beside sft at the same exit, and beside the draft trained for that depth alone."""
    pairs = []
    for ours in (name for name in names if name.startswith("soft")):
        for exit in exits:
            others = ["sft"] if exit == exits[-1] else ["sft", f"sft-{exit}"]
            pairs += [(ours, other, exit) for other in others if other in names]
    return pairs


def _seeds(found: Found, *names: str) -> list[int]:
    """Seeds that all of `names` were measured with."""
    each = [{seed for kind, seed in found if kind == name} for name in names]
    return sorted(set.intersection(*each))


def _columns(found: Found, name: str, exit: str, seeds: Sequence[int], picked: Sequence[int]) -> list[list[float]]:
    """[committed, steps] per prompt, summed over `seeds`."""
    runs = [found[name, seed][exit] for seed in seeds]
    return [[sum(run[what][i] for run in runs) for i in picked] for what in ("committed", "steps")]


def _kind(found: Found, name: str, sides: dict[str, list[int]], seed: int) -> dict[str, Any]:
    seeds = _seeds(found, name)
    exits: dict[str, Any] = {}
    for exit in found[name, seeds[0]]:
        losses = [found[name, one][exit]["loss"] for one in seeds]
        figures: dict[str, Any] = {"loss": statistics.fmean(losses), "loss_by_seed": losses}
        for side, picked in sides.items():
            committed, steps = _columns(found, name, exit, seeds, picked)
            each = [_columns(found, name, exit, [one], picked) for one in seeds]
            figures[side] = {
                "accepted_length": ratio(sum(committed), sum(steps)),
                "interval": ratio_interval(committed, steps, seed=seed),
                "by_seed": [ratio(sum(above), sum(below)) for above, below in each],
            }
        exits[exit] = figures
    return {"seeds": seeds, "exits": exits}


def _compare(found: Found, ours: str, other: str, exit: int, sides: dict[str, list[int]], seed: int) -> dict[str, Any]:
    """accepted_length of `ours` over that of `other`, both leaving after `exit` layers."""
    seeds = _seeds(found, ours, other)
    told: dict[str, Any] = {"kind": ours, "over": other, "exit": exit, "seeds": seeds}
    for side, picked in sides.items():
        mine, theirs = (_columns(found, name, str(exit), seeds, picked) for name in (ours, other))
        told[side] = {
            "ratio": _ratio(mine, theirs),
            "interval": speedup_interval(*mine, *theirs, seed=seed),
            "by_seed": [
                _ratio(*(_columns(found, name, str(exit), [one], picked) for name in (ours, other))) for one in seeds
            ],
        }
    return told


def _ratio(mine: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float | None:
    lengths = [ratio(sum(committed), sum(steps)) for committed, steps in (mine, theirs)]
    return None if lengths[0] is None or lengths[1] is None else ratio(lengths[0], lengths[1])


def markdown(results: dict[str, Any]) -> str:
    """The two tables, as Markdown that a terminal shows as well."""
    count = results["prompts"]
    lines = [
        f"| kind | exit | held-out loss | accepted_length, {count['all']} prompts | by seed "
        f"| {count['not_looping']} whose plain answer does not loop |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, kind in results["kinds"].items():
        for exit, row in kind["exits"].items():
            every, kept = row["all"], row["not_looping"]
            cells = [name, exit, f"{row['loss']:.3f}", _cell(every["accepted_length"], every["interval"]),
                     _list(every["by_seed"]), _cell(kept["accepted_length"], kept["interval"])]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| ratio of accepted_lengths | exit | all prompts | by seed | not looping | by seed |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for row in results["comparisons"]:
        every, kept = row["all"], row["not_looping"]
        cells = [f"{row['kind']} / {row['over']}", str(row["exit"]), _cell(every["ratio"], every["interval"], 3),
                 _list(every["by_seed"], 3), _cell(kept["ratio"], kept["interval"], 3),
                 _list(kept["by_seed"], 3)]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(value: float | None, interval: Sequence[float] | None, digits: int = 2) -> str:
    if value is None:
        return "-"
    between = "" if interval is None else f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"
    return f"{value:.{digits}f}{between}"


def _list(values: Sequence[float | None], digits: int = 2) -> str:
    return ", ".join("-" if value is None else f"{value:.{digits}f}" for value in values)
