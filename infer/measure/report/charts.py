"""The report's pictures as SVG, from figures that the view already has. An empty series gives no picture.

Written by hand rather than with a plotting library so that fonts and colours come from the page and follow its dark
theme, and a picture takes a few kilobytes. All text is escaped here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from markupsafe import Markup, escape

from draftsmith.infer.files.atomic import written_beside

WIDTH = 460
NAMES = 118
# The width of a ray's label, "1.5x".
RAY_NAME = 28
EMPTY = Markup("")
# Each series has a shape as well as a colour, for readers and printers without colour.
SHAPES = ("circle", "square", "up", "diamond", "down", "cross")


@dataclass(frozen=True, slots=True)
class AxisScale:
    """A linear map from [low, high] to [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        return self.start + (self.end - self.start) * ((value - self.low) / span if span else 0.5)

    def ticks(self, count: int = 5) -> list[float]:
        """Round numbers within the range, about `count` of them."""
        step = nice((self.high - self.low) / max(count, 1))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(at * step, 10) for at in range(first, last + 1)]


def nice(step: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `step`."""
    if step <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * (1 - 1e-9))


@dataclass(slots=True)
class Svg:
    """A picture under construction; `title` is for screen readers."""

    width: float
    height: float
    title: str
    parts: list[str] = field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        self.parts.append(f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')

    def rect(self, x: float, y: float, width: float, height: float, css: str, tip: str) -> None:
        shape = f'class="{css}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}"'
        self.parts.append(f"<rect {shape}>{_tip(tip)}</rect>")

    def text(self, x: float, y: float, text: str, css: str = "", anchor: str = "start") -> None:
        given = f' class="{css}"' if css else ""
        self.parts.append(f'<text{given} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def path(self, points: Sequence[tuple[float, float]], css: str) -> None:
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline class="{css}" points="{drawn}"/>')

    def marker(self, x: float, y: float, shape: str, css: str, tip: str = "", size: float = 4.5) -> None:
        outline = _outline(shape, x, y, size)
        self.parts.append(f'<path class="{css}" d="{outline}">{_tip(tip)}</path>')

    def markup(self, css: str = "") -> Markup:
        given = f' class="{css}"' if css else ""
        head = f'<svg{given} viewBox="0 0 {self.width:g} {self.height:g}" role="img">{_tip(self.title)}'
        return Markup(head + "".join(self.parts) + "</svg>")


def _tip(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


def _outline(shape: str, x: float, y: float, size: float) -> str:
    if shape == "circle":
        return f"M{x - size:.1f},{y:.1f}a{size},{size} 0 1 0 {2 * size},0a{size},{size} 0 1 0 {-2 * size},0z"
    corners = {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "up": [(0, -1.15), (1.1, 0.85), (-1.1, 0.85)],
        "down": [(0, 1.15), (1.1, -0.85), (-1.1, -0.85)],
        "diamond": [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
        "cross": [
            (-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4),
            (0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4),
        ],
    }[shape]  # fmt: skip
    return "M" + "L".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in corners) + "z"


@dataclass(frozen=True, slots=True)
class Series:
    """A runner's name and style. `order` numbers the drafters; controls and peers have none and are grey."""

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
    """A value, its interval, and the batch size it was measured at (`where`)."""

    value: float
    interval: Sequence[float] | None = None
    where: str = ""

    @property
    def ends(self) -> Sequence[float]:
        return self.interval or (self.value, self.value)


def short(name: str, limit: int = 20) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def swatch(series: Series) -> Markup:
    """The mark of a series, for legends and tables."""
    svg = Svg(14, 14, "")
    svg.marker(7, 7, series.shape, f"{series.css} fill", size=4.5)
    return svg.markup("swatch")


def speedups(rows: Sequence[tuple[Series, Sequence[Spot]]]) -> Markup:
    """Speedup and its interval, one line per drafter and batch size; right of 1 is faster than plain decoding."""
    spots = [spot for _, own in rows for spot in own]
    if not spots:
        return EMPTY
    lows, highs = zip(*(spot.ends for spot in spots))
    several = any(len(own) > 1 for _, own in rows)
    pitch, gap = 19, 7 if several else 3
    height = 34 + len(spots) * pitch + len(rows) * gap
    svg = Svg(WIDTH, height, "Speedup of each drafter over plain decoding, with 95 % intervals")
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


def lengths(points: Sequence[tuple[Series, float, float]]) -> Markup:
    """(series, cost of a step in plain tokens, accepted_length), with rays of equal speedup from the origin."""
    if not points:
        return EMPTY
    height, bottom = 300, 260
    svg = Svg(WIDTH, height, "accepted_length against the cost of a step; rays of equal speedup")
    x = AxisScale(0, max(1.5, max(cost for _, cost, _ in points) * 1.25), 36, WIDTH - 56)
    y = AxisScale(0, max(1.5, max(length for _, _, length in points) * 1.12), bottom, 12)
    for tick in y.ticks():
        svg.line(x.start, y(tick), x.end, y(tick), "grid")
        svg.text(x.start - 6, y(tick) + 4, f"{tick:g}", "tick", "end")
    for tick in x.ticks(6):
        svg.text(x(tick), bottom + 16, f"{tick:g}", "tick", "middle")
    svg.text((x.start + x.end) / 2, height - 6, "cost of a step, in plain decoding steps", "tick", "middle")
    named = float("inf")
    for ratio in (0.5, 1, 1.5, 2, 3, 4, 6, 8):
        cost = min(x.high, y.high / ratio)
        # Steep rays end close together at the top: skip those whose labels would overlap.
        if ratio != 1 and (ratio < 0.5 * y.high / x.high or named - x(cost) < RAY_NAME):
            continue
        named = x(cost) if cost < x.high else named
        svg.line(x(0), y(0), x(cost), y(cost * ratio), "even" if ratio == 1 else "ray")
        svg.text(min(x(cost) + 4, WIDTH - 30), max(y(cost * ratio) + 4, 10), f"{ratio:g}x", "ray-name")
    for (series, cost, length), at in zip(points, _apart([y(length) for _, _, length in points])):
        tip = f"{series.name}: accepted_length {length:.2f} at a cost of {cost:.2f} plain steps, {length / cost:.2f}x"
        svg.marker(x(cost), y(length), series.shape, f"{series.css} fill", tip, 5.5)
        svg.text(x(cost) + 9, at + 4, short(series.name, 14), "name halo")
    return svg.markup("wide")


def _apart(places: Sequence[float], least: float = 14) -> list[float]:
    """Move labels down where they would overlap."""
    found = list(places)
    last = float("-inf")
    for index in sorted(range(len(places)), key=places.__getitem__):
        found[index] = last = max(places[index], last + least)
    return found


def lines(
    title: str,
    series: Sequence[tuple[Series, Mapping[int, float]]],
    columns: Sequence[str],
    below: str,
    *,
    percent: bool = False,
    even: bool = False,
    unit: str = "x",
) -> Markup:
    """One line per series over the named columns; `even` draws the line at 1, plain decoding.

    `unit` stands behind the numbers.
    """
    values = [value for _, points in series for value in points.values()]
    if not values:
        return EMPTY
    height, bottom = 230, 190
    svg = Svg(WIDTH, height, title)
    y = AxisScale(0, 1 if percent else max(1.2, max(values) * 1.08), bottom, 10)
    x = AxisScale(0, max(len(columns) - 1, 1), 52, WIDTH - 22)
    for tick in y.ticks():
        svg.line(40, y(tick), WIDTH - 8, y(tick), "grid")
        svg.text(34, y(tick) + 4, f"{tick:.0%}" if percent else f"{tick:g}{unit}", "tick", "end")
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
            shown = f"{value:.1%}" if percent else f"{value:.2f}{unit}"
            svg.marker(x(index), y(value), one.shape, f"{one.css} fill", f"{one.name}, {columns[index]}: {shown}", 3.6)
    return svg.markup("wide")


def shares(rows: Sequence[tuple[str, Mapping[str, float | None]]]) -> Markup:
    """Where a step's time goes: target, draft and overhead as parts of one bar."""
    rows = [(name, parts) for name, parts in rows if all(value is not None for value in parts.values())]
    if not rows:
        return EMPTY
    height = len(rows) * 24 + 4
    svg = Svg(WIDTH, height, "Share of a step's time in the target, the draft model and outside both")
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
    """Counts as bars, each with its share of the total."""
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
    """accepted_length on a line from 1; a bar marks the break-even, an open ring the oracle."""
    svg = Svg(150, 16, "accepted_length, its break-even and the oracle's accepted_length")
    x = AxisScale(1, max(value for value in (length, needed, ceiling, 2.0) if value is not None), 6, 144)
    svg.line(6, 8, 144, 8, "grid")
    svg.line(6, 8, x(length), 8, f"{series.css} whisker")
    if ceiling is not None:
        svg.marker(x(ceiling), 8, "circle", "ring", f"oracle {ceiling:.2f}", 3.5)
    svg.marker(x(length), 8, series.shape, f"{series.css} fill", f"accepted_length {length:.2f}", 4)
    if needed is not None:
        svg.line(x(max(needed, 1)), 1, x(max(needed, 1)), 15, "needed")
    return svg.markup("bullet")


def write_svg(path: Path, panels: Sequence[tuple[str, Markup]], legend: Sequence[Series] = ()) -> None:
    """Write (heading, picture) pairs, one below the other, as an SVG file in the page's light colours."""
    width, y = WIDTH + 24, 0.0
    svg = Svg(width, 0, "")
    for heading, picture in panels:
        height = float(re.findall(r'viewBox="0 0 \S+ (\S+)"', picture)[0])
        svg.text(12, y + 20, heading, "value")
        svg.parts.append(
            str(picture).replace("<svg", f'<svg x="12" y="{y + 32:g}" width="{WIDTH}" height="{height:g}"', 1)
        )
        y += height + 44
    for series in legend:
        svg.marker(18, y + 4, series.shape, f"{series.css} fill")
        svg.text(30, y + 8, series.name)
        y += 18
    svg.height = y + 8
    size = f'xmlns="http://www.w3.org/2000/svg" width="{width}" height="{svg.height:g}" style="font-family: sans-serif"'
    style, paper = _light_style()
    svg.parts.insert(0, f'<style>{style}</style><rect width="100%" height="100%" fill="{paper}"/>')
    with written_beside(path) as file:
        file.write(str(svg.markup()).replace("<svg", f"<svg {size}", 1) + "\n")


def _light_style() -> tuple[str, str]:
    """(the page's rules for pictures, the paper's colour); variables are resolved, since only browsers know them."""
    css = files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    light: dict[str, str] = dict(re.findall(r"--([\w-]+): (#\w+);", css.partition("@media")[0]))
    rules = re.findall(r"^svg [.t].*", css, re.MULTILINE)
    for i in range(8):
        rules.append(f".s{i}.fill {{ fill: var(--c{i}); }} .s{i}.stroke, .s{i}.whisker {{ stroke: var(--c{i}); }}")
    style = re.sub(r"var\(--([\w-]+)\)", lambda match: light.get(match[1], light["soft"]), "\n".join(rules))
    return style, light["paper"]
