"""What a distillation study comes to: accepted_length per arm and way of drafting, and ratios of arms.

How figures are pooled and compared is study_figures.py's. How runs were made is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from draftsmith.recipes.studies.study_figures import Found, alone, cell, compared, listed, sides


def summarise(found: Found, distinct: Sequence[float], pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Every arm's accepted_length, and of each pair the first over the second; with looping prompts and without."""
    both = sides(distinct)
    arms = list(dict.fromkeys(name for name, _ in found))
    return {
        "prompts": {side: len(picked) for side, picked in both.items()},
        "arms": {name: {side: _arm(found, name, picked) for side, picked in both.items()} for name in arms},
        "ratios": [
            {"arm": one, "over": other, **{side: _pair(found, one, other, picked) for side, picked in both.items()}}
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


def _arm(found: Found, name: str, picked: Sequence[int]) -> dict[str, Any]:
    return {way: alone(found, name, way, seeds, picked) for way, seeds in _ways(found, name).items()}


def _pair(found: Found, one: str, other: str, picked: Sequence[int]) -> dict[str, Any]:
    return {way: compared(found, one, other, way, seeds, picked) for way, seeds in _ways(found, one, other).items()}


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
        else:
            cells.append(f"{cell(found[what], found['interval'], digits)} ({listed(found['by_seed'], digits)})")
    return f"| {name} | {' | '.join(cells)} |"
