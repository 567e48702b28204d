"""Marks on a page: an SVG picture from lines, rectangles, markers and text, and scales from numbers to places.

By hand because a plotting library's SVG brings its own fonts and colours: these take both from the page, and so follow
it into the dark, and a picture is a few kilobytes. What is drawn is not known here; all text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

# One shape per series beside its colour, for eyes and printers that see no colours.
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
    """A picture `width` x `height`, told to screen readers as `title`."""

    width: float
    height: float
    title: str
    parts: list[str] = field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str = "axis") -> None:
        self.parts.append(f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')

    def rect(self, x: float, y: float, width: float, height: float, css: str, tip: str = "") -> None:
        shape = f'class="{css}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}"'
        self.parts.append(f"<rect {shape}>{_tip(tip)}</rect>" if tip else f"<rect {shape}/>")

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
