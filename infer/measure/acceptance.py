"""A curve of acceptance by depth: assumed, or as a benchmark or a replay measured it, and the length that it promises.

A chain's curve is the share of the tokens reached at each depth that were accepted; a tree's, the share of the steps
that got as far as one depth and got to the next (many candidates may be tried for one that is accepted). The two are
not the same thing, and neither is taken for the other. Costs are not known here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Curve = tuple[float, ...]


def parse(text: str, *, trees: bool = False) -> Curve:
    """'0.7', '0.8,0.7,0.6' (by depth; the last goes on), FILE, or FILE:DRAFTER with a result of bench or replay."""
    try:
        curve = tuple(float(word) for word in text.split(","))
    except ValueError:
        return _from_file(text, trees)
    if not all(0 <= share <= 1 for share in curve):
        raise ValueError(f"acceptance is a share, from 0 to 1, not {text}")
    return curve


def expected_length(curve: Sequence[float], depth: int) -> float:
    """accepted_length of drafts `depth` deep: the target's own token, and every depth as often as it is reached."""
    length, reach = 1.0, 1.0
    for d in range(depth):
        reach *= curve[min(d, len(curve) - 1)]
        length += reach
    return length


def _from_file(text: str, trees: bool) -> Curve:
    path, name = Path(text), ""
    if not path.is_file():
        before, _, name = text.rpartition(":")
        path = Path(before)
        if not before or not path.is_file():
            raise ValueError(f"{text} is neither a share, shares by depth, nor a file of results")
    row = _drafter(path, name)
    return _curve(row, trees, str(path))


def _drafter(path: Path, name: str) -> dict[str, Any]:
    """The one drafter in the file that drafted anything, or the one that is named."""
    try:
        lines = path.read_text(encoding="utf-8").strip()
        said = json.loads(lines if lines.startswith("{") and "\n{" not in lines else lines.splitlines()[-1])
        found = {key: row for key, row in said["drafters"].items() if row.get("by_depth")}
    except (json.JSONDecodeError, IndexError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} holds no results of bench or replay: their --json line is meant") from None
    if name and name not in found:
        raise ValueError(f"{path} has no figures by depth of {name!r}; it has them of {', '.join(found) or 'none'}")
    if not name and len(found) != 1:
        names = ", ".join(found) or "none"
        raise ValueError(f"{path} has figures by depth of {names}: name one drafter, as {path}:NAME")
    return dict(found[name] if name else next(iter(found.values())))


def _curve(row: dict[str, Any], trees: bool, where: str) -> Curve:
    depths = sorted(row["by_depth"], key=lambda one: one["depth"])
    reached = [one["reached"] for one in depths]
    accepted = [one["accepted"] for one in depths]
    survived = [row["steps"], *accepted[:-1]]
    grown = any(tried > came for tried, came in zip(reached, survived))
    if grown and not trees:
        raise ValueError(f"the drafts in {where} were trees: give them as --tree_acceptance")
    over = survived if trees else reached
    curve = [a / b for a, b in zip(accepted, over) if b]
    if not curve:
        raise ValueError(f"{where}: no draft was ever tried")
    return tuple(curve)
