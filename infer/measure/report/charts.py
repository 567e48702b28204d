"""The pictures of a report, each from figures that are there already: nothing is computed here but places on paper.

A series has one colour and one shape on the whole page. Where figures lack, a picture is left out, never drawn empty.
What the figures mean, and what stands around the pictures, is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from draftsmith.infer.measure.report.svg import SHAPES, AxisScale, Svg

WIDTH = 460
NAMES = 118
EMPTY = Markup("")


@dataclass(frozen=True, slots=True)
class Series:
    """A runner in pictures. `order` numbers the drafters; controls and peers have none and stay grey."""

    name: str
    order: int | None = None

    @property
    def css(self) -> str:
        return "muted" if self.order is None else f"s{self.order % 8}"

    @property
    def shape(self) -> str:
        return "square" if self.order is None else SHAPES[self.order % len(SHAPES)]


@dataclass(frozen=True, slots=True)
class Spot:
    """A value with what may stand around it: its interval, and a short word about where it was measured."""

    value: float
    interval: Sequence[float] | None = None
    where: str = ""


def short(name: str, limit: int = 20) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def swatch(series: Series) -> Markup:
    """The mark of a series, for legends and tables."""
    svg = Svg(14, 14, "")
    svg.marker(7, 7, series.shape, f"{series.css} fill", size=4.5)
    return svg.markup("swatch")


def speedups(rows: Sequence[tuple[Series, Sequence[Spot]]]) -> Markup:
    """Speedup with its interval, a line per drafter and batch size; what lies right of 1 is faster than plain."""
    spots = [spot for _, own in rows for spot in own]
    if not spots:
        return EMPTY
    lows = [spot.interval[0] if spot.interval else spot.value for spot in spots]
    highs = [spot.interval[1] if spot.interval else spot.value for spot in spots]
    several = any(len(own) > 1 for _, own in rows)
    pitch, gap = 19, 7 if several else 3
    height = 34 + len(spots) * pitch + len(rows) * gap
    svg = Svg(WIDTH, height, "Speedup of each drafter, ratio to plain decoding, with 95 % intervals")
    x = AxisScale(min(0.8, min(lows) * 0.95), max(1.2, max(highs) * 1.04), NAMES, WIDTH - (112 if several else 50))
    for tick in x.ticks():
        svg.line(x(tick), 6, x(tick), height - 22, "grid")
        svg.text(x(tick), height - 8, f"{tick:g}x", "tick", "middle")
    svg.line(x(1), 2, x(1), height - 22, "even")
    y = 8.0
    for series, own in rows:
        svg.text(0, y + 12, short(series.name, 17), "name")
        for spot in own:
            if spot.interval:
                svg.line(x(spot.interval[0]), y + 8, x(spot.interval[1]), y + 8, f"{series.css} whisker")
            tip = f"{series.name} {spot.where}: {spot.value:.2f}x"
            svg.marker(x(spot.value), y + 8, series.shape, f"{series.css} fill", tip)
            svg.text(WIDTH, y + 12, f"{spot.value:.2f}x" + (f" {spot.where}" if several else ""), "value", "end")
            y += pitch
        y += gap
    return svg.markup("wide")


# The width of a ray's name, "1.5x".
RAY_NAME = 28


def lengths(points: Sequence[tuple[Series, float, float]]) -> Markup:
    """(series, cost of a step in plain tokens, accepted_length): rays of equal speedup run through the corner."""
    if not points:
        return EMPTY
    height, bottom = 300, 260
    svg = Svg(WIDTH, height, "accepted_length against the cost of a step; rays of equal speedup")
    x = AxisScale(0, max(1.5, max(cost for _, cost, _ in points) * 1.25), 36, WIDTH - 56)
    y = AxisScale(0, max(1.5, max(length for _, _, length in points) * 1.12), bottom, 12)
    _frame(svg, x, y, bottom)
    svg.text((x.start + x.end) / 2, height - 6, "cost of a step, in plain decoding's tokens", "tick", "middle")
    named = float("inf")
    for ratio in (0.5, 1, 1.5, 2, 3, 4, 6, 8):
        cost = min(x.high, y.high / ratio)
        # Steep rays end side by side at the top: those whose names would cover one another say nothing more.
        if ratio != 1 and (ratio < 0.5 * y.high / x.high or named - x(cost) < RAY_NAME):
            continue
        named = x(cost) if cost < x.high else named
        svg.line(x(0), y(0), x(cost), y(cost * ratio), "even" if ratio == 1 else "ray")
        svg.text(min(x(cost) + 4, WIDTH - 30), max(y(cost * ratio) + 4, 10), f"{ratio:g}x", "ray-name")
    for (series, cost, length), at in zip(points, _apart([y(length) for _, _, length in points])):
        tip = f"{series.name}: accepted_length {length:.2f} at {cost:.2f} plain tokens a step, {length / cost:.2f}x"
        svg.marker(x(cost), y(length), series.shape, f"{series.css} fill", tip, 5.5)
        svg.text(x(cost) + 9, at + 4, short(series.name, 14), "name halo")
    return svg.markup("wide")


def _apart(places: Sequence[float], least: float = 14) -> list[float]:
    """Names that would cover one another move down, the topmost first."""
    found = list(places)
    last = float("-inf")
    for index in sorted(range(len(places)), key=places.__getitem__):
        found[index] = last = max(places[index], last + least)
    return found


def _frame(svg: Svg, x: AxisScale, y: AxisScale, bottom: float, percent: bool = False) -> None:
    for tick in y.ticks():
        svg.line(x.start, y(tick), x.end, y(tick), "grid")
        svg.text(x.start - 6, y(tick) + 4, f"{tick:.0%}" if percent else f"{tick:g}", "tick", "end")
    for tick in x.ticks(6):
        svg.text(x(tick), bottom + 16, f"{tick:g}", "tick", "middle")


def lines(
    title: str,
    series: Sequence[tuple[Series, Mapping[int, float]]],
    columns: Sequence[str],
    below: str,
    *,
    percent: bool = False,
    even: bool = False,
) -> Markup:
    """One line per series over the named columns; `even` draws the line at 1 that stands for plain decoding."""
    values = [value for _, points in series for value in points.values()]
    if not values:
        return EMPTY
    height, bottom = 230, 190
    svg = Svg(WIDTH, height, title)
    y = AxisScale(0, 1 if percent else max(1.2, max(values) * 1.08), bottom, 10)
    x = AxisScale(0, max(len(columns) - 1, 1), 52, WIDTH - 22)
    for tick in y.ticks():
        svg.line(40, y(tick), WIDTH - 8, y(tick), "grid")
        svg.text(34, y(tick) + 4, f"{tick:.0%}" if percent else f"{tick:g}x", "tick", "end")
    every = -(-len(columns) // 9)
    for index, name in enumerate(columns):
        if index % every == 0:
            svg.text(x(index), bottom + 17, name, "tick", "middle")
    svg.text(WIDTH / 2, height - 4, below, "tick", "middle")
    if even:
        svg.line(40, y(1), WIDTH - 8, y(1), "even")
    for one, points in series:
        ordered = sorted(points.items())
        svg.path([(x(index), y(value)) for index, value in ordered], f"{one.css} stroke")
        for index, value in ordered:
            shown = f"{value:.1%}" if percent else f"{value:.2f}x"
            svg.marker(x(index), y(value), one.shape, f"{one.css} fill", f"{one.name}, {columns[index]}: {shown}", 3.6)
    return svg.markup("wide")


def shares(rows: Sequence[tuple[str, Mapping[str, float | None]]]) -> Markup:
    """Where a step's time goes: target, draft and overhead add up to the whole bar."""
    rows = [(name, parts) for name, parts in rows if all(value is not None for value in parts.values())]
    if not rows:
        return EMPTY
    height = len(rows) * 24 + 4
    svg = Svg(WIDTH, height, "Share of a step's time in the target, in the draft model, and outside both")
    x = AxisScale(0, 1, NAMES, WIDTH)
    for row, (name, parts) in enumerate(rows):
        y, at = row * 24 + 2, 0.0
        svg.text(0, y + 14, short(name, 17), "name")
        for part in ("target", "draft", "overhead"):
            value = max(parts[part] or 0.0, 0.0)
            svg.rect(x(at), y, x(at + value) - x(at), 18, f"part-{part}", f"{name}, {part}: {value:.1%}")
            if value >= 0.07:
                svg.text((x(at) + x(at + value)) / 2, y + 13, f"{value:.0%}", f"on-{part}", "middle")
            at += value
    return svg.markup("wide")


def bars(title: str, counts: Mapping[str, int], css: str) -> Markup:
    """Counts as bars, the share of the whole behind each."""
    whole = sum(counts.values())
    if not whole:
        return EMPTY
    svg = Svg(WIDTH, len(counts) * 22 + 4, title)
    x = AxisScale(0, max(counts.values()), NAMES, WIDTH - 110)
    for row, (name, count) in enumerate(counts.items()):
        y = row * 22 + 2
        svg.text(0, y + 13, short(name, 17), "name")
        svg.rect(x(0), y, x(count) - x(0), 16, f"{css} fill", f"{name}: {count}")
        svg.text(WIDTH, y + 13, f"{count:,} ({count / whole:.0%})", "value", "end")
    return svg.markup("wide")


def bullet(series: Series, length: float, needed: float | None, ceiling: float | None) -> Markup:
    """accepted_length on a line from 1, the break-even as a bar across it, the oracle's as an open ring."""
    svg = Svg(150, 16, "accepted_length, its break-even and the oracle's")
    x = AxisScale(1, max(value for value in (length, needed, ceiling, 2.0) if value is not None), 6, 144)
    svg.line(6, 8, 144, 8, "grid")
    svg.line(6, 8, x(length), 8, f"{series.css} whisker")
    if ceiling is not None:
        svg.marker(x(ceiling), 8, "circle", "ring", f"the oracle's {ceiling:.2f}", 3.5)
    svg.marker(x(length), 8, series.shape, f"{series.css} fill", f"accepted_length {length:.2f}", 4)
    if needed is not None:
        svg.line(x(max(needed, 1)), 1, x(max(needed, 1)), 15, "needed")
    return svg.markup("bullet")
