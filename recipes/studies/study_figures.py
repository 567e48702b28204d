"""What studies of training come to: accepted_length of a run, and of one run over another's, from what was measured.

The seeds are pooled prompt by prompt: a prompt's committed tokens and steps are summed over the seeds, and prompts are
drawn with replacement, the same draws for both sides of a ratio. So an interval tells what other prompts would have
given, not what other seeds would have: each seed's own figure stands beside it. A prompt whose plain greedy answer
repeats itself flatters every draft; figures are told with such prompts and without. Which runs are compared, and how
they were made, is not known here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from draftsmith.infer.measure.bootstrap import ratio_interval, speedup_interval
from draftsmith.infer.measure.metrics import ratio

MIN_DISTINCT = 0.5
# (run, seed) -> way of drafting -> {"committed": per prompt, "steps": per prompt, ...}
Found = dict[tuple[str, int], dict[str, dict[str, Any]]]


def read_found(out: Path) -> tuple[Found, list[float]]:
    """What has been measured in a study's folder, finished or not; and the distinct share of plain's answers."""
    found: Found = {}
    for path in sorted((out / "measured").glob("*.json")):
        name, _, seed = path.stem.rpartition("-")
        found[name, int(seed)] = json.loads(path.read_text(encoding="utf-8"))
    plain = out / "plain.json"
    return found, json.loads(plain.read_text(encoding="utf-8"))["distinct"] if plain.is_file() else []


def sides(distinct: Sequence[float]) -> dict[str, list[int]]:
    """Prompts by what is told of them: all, and those whose plain answer does not loop."""
    every = list(range(len(distinct)))
    return {"all": every, "not_looping": [i for i in every if distinct[i] >= MIN_DISTINCT]}


def alone(found: Found, name: str, way: str, seeds: Sequence[int], picked: Sequence[int]) -> dict[str, Any]:
    """accepted_length of a run over the `picked` prompts."""
    columns = _columns(found, name, way, seeds, picked)
    return {
        "accepted_length": _length(columns),
        "interval": ratio_interval(*columns, seed=0),
        "by_seed": [_length(_columns(found, name, way, [one], picked)) for one in seeds],
    }


def compared(
    found: Found, one: str, other: str, way: str, seeds: Sequence[int], picked: Sequence[int]
) -> dict[str, Any]:
    """accepted_length of `one` over that of `other`."""
    mine, theirs = (_columns(found, name, way, seeds, picked) for name in (one, other))
    each = [[_columns(found, name, way, [seed], picked) for name in (one, other)] for seed in seeds]
    return {
        "ratio": _ratio(mine, theirs),
        "interval": speedup_interval(*mine, *theirs, seed=0),
        "by_seed": [_ratio(*pair) for pair in each],
    }


def cell(value: float | None, interval: Sequence[float] | None, digits: int = 2) -> str:
    """A figure and its interval, as tables show them."""
    if value is None:
        return "-"
    between = "" if interval is None else f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"
    return f"{value:.{digits}f}{between}"


def listed(values: Sequence[float | None], digits: int = 2) -> str:
    return ", ".join("-" if value is None else f"{value:.{digits}f}" for value in values)


def _columns(found: Found, name: str, way: str, seeds: Sequence[int], picked: Sequence[int]) -> list[list[float]]:
    """[committed, steps] per prompt, summed over `seeds`."""
    runs = [found[name, seed][way] for seed in seeds]
    return [[sum(run[what][i] for run in runs) for i in picked] for what in ("committed", "steps")]


def _length(columns: Sequence[Sequence[float]]) -> float | None:
    return ratio(sum(columns[0]), sum(columns[1]))


def _ratio(mine: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float | None:
    above, below = _length(mine), _length(theirs)
    return None if above is None or below is None else ratio(above, below)
