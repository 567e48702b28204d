"""What a distillation study comes to: accepted_length per arm and way of drafting, and ratios of arms.

The seeds are pooled prompt by prompt: a prompt's committed tokens and steps are summed over the seeds that both sides
have, and prompts are drawn with replacement, the same draws for both sides. So an interval tells what other prompts
would have given, not other seeds: each seed's own ratio stands beside it. A prompt whose plain greedy answer repeats
itself flatters every draft; the figures are told with them and without. How runs were made is not known here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from draftsmith.infer.measure.bootstrap import ratio_interval, speedup_interval
from draftsmith.infer.measure.metrics import ratio

MIN_DISTINCT = 0.5
# (arm, seed) -> way -> committed and steps per prompt
Found = dict[tuple[str, int], dict[str, dict[str, Any]]]


def read_found(out: Path) -> tuple[Found, list[float]]:
    """What is measured so far, and the distinct share of every prompt's plain answer."""
    found: Found = {}
    for path in sorted((out / "measured").glob("*.json")):
        name, _, seed = path.stem.rpartition("-")
        found[name, int(seed)] = json.loads(path.read_text(encoding="utf-8"))
    plain = out / "plain.json"
    return found, json.loads(plain.read_text(encoding="utf-8"))["distinct"] if plain.is_file() else []


def summarise(found: Found, distinct: Sequence[float], pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Every arm's accepted_length, and of each pair the first over the second; with looping prompts and without."""
    sides = {
        "all": list(range(len(distinct))),
        "not_looping": [i for i, share in enumerate(distinct) if share >= MIN_DISTINCT],
    }
    arms = list(dict.fromkeys(name for name, _ in found))
    return {
        "prompts": {side: len(picked) for side, picked in sides.items()},
        "arms": {name: {side: _arm(found, name, picked) for side, picked in sides.items()} for name in arms},
        "ratios": [
            {"arm": one, "over": other, **{side: _pair(found, one, other, picked) for side, picked in sides.items()}}
            for one, other in pairs
            if one in arms and other in arms
        ],
    }


def _ways(found: Found, *names: str) -> dict[str, list[int]]:
    """way -> seeds, of those that all of `names` were measured by."""
    each = [{seed: set(ways) - {"loss"} for (name, seed), ways in found.items() if name == one} for one in names]
    seeds = sorted(set.intersection(*(set(one) for one in each)))
    ways: dict[str, list[int]] = {}
    for seed in seeds:
        for way in sorted(set.intersection(*(one[seed] for one in each))):
            ways.setdefault(way, []).append(seed)
    return ways


def _columns(found: Found, name: str, way: str, seeds: Sequence[int], picked: Sequence[int]) -> list[list[float]]:
    """[committed, steps] of every picked prompt, summed over `seeds`."""
    runs = [found[name, seed][way] for seed in seeds]
    return [[sum(run[what][i] for run in runs) for i in picked] for what in ("committed", "steps")]


def _length(columns: Sequence[Sequence[float]]) -> float | None:
    return ratio(sum(columns[0]), sum(columns[1]))


def _arm(found: Found, name: str, picked: Sequence[int]) -> dict[str, Any]:
    figures = {}
    for way, seeds in _ways(found, name).items():
        columns = _columns(found, name, way, seeds, picked)
        figures[way] = {
            "accepted_length": _length(columns),
            "interval": ratio_interval(*columns, seed=0),
            "by_seed": {seed: _length(_columns(found, name, way, [seed], picked)) for seed in seeds},
        }
    return figures


def _pair(found: Found, one: str, other: str, picked: Sequence[int]) -> dict[str, Any]:
    figures = {}
    for way, seeds in _ways(found, one, other).items():
        mine, theirs = (_columns(found, name, way, seeds, picked) for name in (one, other))
        figures[way] = {
            "ratio": _ratio(mine, theirs),
            "interval": speedup_interval(*mine, *theirs, seed=0),
            "by_seed": {
                seed: _ratio(*(_columns(found, name, way, [seed], picked) for name in (one, other))) for seed in seeds
            },
        }
    return figures


def _ratio(mine: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float | None:
    above, below = _length(mine), _length(theirs)
    return None if above is None or below is None else ratio(above, below)


def markdown(results: dict[str, Any], side: str = "all") -> str:
    """Both tables, as Markdown that a terminal shows as well."""
    ways = sorted({way for figures in results["arms"].values() for way in figures[side]})
    rule = "| --- " * (len(ways) + 1) + "|"
    count = results["prompts"][side]
    lines = [f"accepted_length, {count} prompts ({side}); in brackets 95 % over prompts, then each seed's", ""]
    lines += [f"| arm | {' | '.join(ways)} |", rule]
    for name, figures in results["arms"].items():
        lines.append(_row(name, figures[side], ways, "accepted_length", 2))
    lines += ["", f"| ratio | {' | '.join(ways)} |", rule]
    for pair in results["ratios"]:
        lines.append(_row(f"{pair['arm']} / {pair['over']}", pair[side], ways, "ratio", 3))
    return "\n".join(lines) + "\n"


def _row(name: str, figures: dict[str, Any], ways: Sequence[str], what: str, digits: int) -> str:
    cells = []
    for way in ways:
        found = figures.get(way)
        if found is None or found[what] is None:
            cells.append("-")
            continue
        low, high = found["interval"] or (float("nan"), float("nan"))
        seeds = ", ".join(f"{value:.{digits}f}" for value in found["by_seed"].values() if value is not None)
        cells.append(f"{found[what]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}] ({seeds})")
    return f"| {name} | {' | '.join(cells)} |"
