"""Three pictures of a report as PNG files, for slides and pages that take no SVG; drawn by matplotlib from the view."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from draftsmith.infer.measure.report.charts import SHAPES, Series
from draftsmith.infer.measure.report.page import depths, length_points, speeds
from draftsmith.infer.measure.report.view import View

COLOURS = ("#0072b2", "#d55e00", "#00866a", "#b0568c", "#9a6a00", "#3a86b8", "#6b4fa0", "#7a7a2a")
MARKERS = dict(zip(SHAPES, ("o", "s", "^", "D", "v", "P")))
GREY = "#5b636d"


def write_pictures(view: View, page: Path) -> list[str]:
    """Write NAME-speedup.png, -length.png and -depth.png beside the page; returns the names of those that have data."""
    drawers: dict[str, Callable[[View, Any], bool]] = {"speedup": _speedup, "length": _length, "depth": _depth}
    from matplotlib.figure import Figure

    names = []
    for kind, draw in drawers.items():
        figure = Figure(figsize=(7.2, 4.4), dpi=130, layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        if not draw(view, axes):
            continue
        name = f"{page.stem}-{kind}.png"
        data = io.BytesIO()
        figure.savefig(data, format="png", metadata={"Software": None})
        _write(page.with_name(name), data.getvalue())
        names.append(name)
    return names


def _write(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _colour(series: Series) -> str:
    return GREY if series.order is None else COLOURS[series.order % len(COLOURS)]


def _text(name: str) -> str:
    """matplotlib reads mathematics between dollar signs; a name is a name."""
    return name.replace("$", r"\$")


def _speedup(view: View, axes: Any) -> bool:
    rows = [(series, spot) for series, spots in speeds(view.groups[0]) for spot in spots]
    several = len(view.groups[0].sections) > 1
    for place, (series, spot) in enumerate(reversed(rows)):
        low, high = spot.interval or (spot.value, spot.value)
        spread = [[max(spot.value - low, 0)], [max(high - spot.value, 0)]]
        axes.errorbar(
            [spot.value], [place], xerr=spread, fmt=MARKERS[series.shape], color=_colour(series), elinewidth=2
        )
    names = [_text(f"{series.name} {spot.where}" if several else series.name) for series, spot in reversed(rows)]
    axes.set_yticks(range(len(rows)), names)
    axes.axvline(1, color=GREY, linestyle="--", linewidth=1)
    axes.set_xlabel("speedup over plain decoding, 95 % interval")
    return bool(rows)


def _length(view: View, axes: Any) -> bool:
    points = length_points(view.groups[0].sections[0])
    for series, cost, length in points:
        axes.plot([cost], [length], MARKERS[series.shape], color=_colour(series))
        axes.annotate(_text(series.name), (cost, length), xytext=(6, 4), textcoords="offset points", fontsize=9)
    edge = max([1.5, *(cost for _, cost, _ in points)]) * 1.25
    top = max([1.5, *(length for _, _, length in points)]) * 1.12
    for ratio in (1, 2, 3):
        axes.plot([0, edge], [0, ratio * edge], color=GREY, linestyle="--" if ratio == 1 else ":", linewidth=1)
        end = (edge, ratio * edge) if ratio * edge <= top else (top / ratio, top)
        axes.annotate(f"{ratio}x", end, xytext=(3, 1), textcoords="offset points", fontsize=8, color=GREY)
    axes.set(
        xlim=(0, edge), ylim=(0, top), xlabel="cost of a step, in plain decoding's tokens", ylabel="accepted_length"
    )
    return bool(points)


def _depth(view: View, axes: Any) -> bool:
    rows, _ = depths(view.groups[0].sections[0])
    for series, points in rows:
        style = {"color": _colour(series), "marker": MARKERS[series.shape], "markersize": 4}
        axes.plot([place + 1 for place in points], list(points.values()), label=_text(series.name), **style)
    axes.set(ylim=(0, 1), xlabel="depth", ylabel="share accepted of those reached")
    if rows:
        axes.legend(frameon=False)
    return bool(rows)
