"""What a learning study comes to: accepted_length per kind of run and exit, and sorted training beside the others.

How figures are pooled and compared is study_figures.py's. Where the runs come from is not known here.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from draftsmith.recipes.studies.study_figures import Found, alone, cell, compared, listed, sides


def summarise(found: Found, distinct: Sequence[float], exits: Sequence[int]) -> dict[str, Any]:
    """Figures over all prompts, and over those whose plain answer does not loop."""
    both = sides(distinct)
    names = [name for name in _order(found, exits) if any(kind == name for kind, _ in found)]
    return {
        "prompts": {side: len(picked) for side, picked in both.items()},
        "kinds": {name: _kind(found, name, both) for name in names},
        "comparisons": [_compare(found, ours, others, exit, both) for ours, others, exit in _pairs(names, exits)],
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


def _kind(found: Found, name: str, both: dict[str, list[int]]) -> dict[str, Any]:
    seeds = _seeds(found, name)
    exits: dict[str, Any] = {}
    for exit in found[name, seeds[0]]:
        losses = [found[name, one][exit]["loss"] for one in seeds]
        exits[exit] = {"loss": statistics.fmean(losses), "loss_by_seed": losses}
        exits[exit] |= {side: alone(found, name, exit, seeds, picked) for side, picked in both.items()}
    return {"seeds": seeds, "exits": exits}


def _compare(found: Found, ours: str, other: str, exit: int, both: dict[str, list[int]]) -> dict[str, Any]:
    """accepted_length of `ours` over that of `other`, both leaving after `exit` layers."""
    seeds = _seeds(found, ours, other)
    told: dict[str, Any] = {"kind": ours, "over": other, "exit": exit, "seeds": seeds}
    return told | {side: compared(found, ours, other, str(exit), seeds, picked) for side, picked in both.items()}


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
            cells = [name, exit, f"{row['loss']:.3f}", cell(every["accepted_length"], every["interval"]),
                     listed(every["by_seed"]), cell(kept["accepted_length"], kept["interval"])]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| ratio of accepted_lengths | exit | all prompts | by seed | not looping | by seed |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for row in results["comparisons"]:
        every, kept = row["all"], row["not_looping"]
        cells = [f"{row['kind']} / {row['over']}", str(row["exit"]), cell(every["ratio"], every["interval"], 3),
                 listed(every["by_seed"], 3), cell(kept["ratio"], kept["interval"], 3),
                 listed(kept["by_seed"], 3)]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
