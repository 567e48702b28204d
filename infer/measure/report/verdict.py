"""The sentence that a report begins with: which drafter to use, at which batch sizes, or that none pays.

A drafter pays where the whole interval of its speedup lies above 1; where the interval holds 1 it cannot be told from
plain decoding, and is not recommended. One whose answers differ from plain decoding's, at temperature 0 and not by a
numeric tie, is out, however fast it is. Pages and pictures are not known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from draftsmith.infer.measure.tables import with_interval


@dataclass(frozen=True, slots=True)
class SpeedPoint:
    """One drafter at one batch size."""

    batch_size: int
    speedup: float
    interval: tuple[float, float] | None

    @property
    def pays(self) -> bool:
        return self.interval is not None and self.interval[0] > 1

    @property
    def open(self) -> bool:
        """Neither faster nor slower for certain."""
        return self.interval is None or self.interval[0] <= 1 <= self.interval[1]

    def text(self, interval: bool = False) -> str:
        if not interval or self.interval is None:
            return f"{self.speedup:.2f}x"
        return with_interval(self.speedup, self.interval).replace(" [", "x [")


Points = Mapping[str, Sequence[SpeedPoint]]


@dataclass(frozen=True, slots=True)
class Recommendation:
    """`use` is the drafter to take at `batch_size`, or none; `refused` are those whose answers are wrong."""

    sentence: str
    use: str | None = None
    batch_size: int | None = None
    notes: list[str] = field(default_factory=list)


def verdict(
    points: Points,
    wrong: Mapping[str, int],
    temperature: float | None = None,
    settings: Mapping[str, str] | None = None,
) -> Recommendation:
    """`points`: the drafters to choose among, no controls and no peers; `wrong`: their differences that are no ties.

    `settings` are what a drafter was given in brackets, to be named with it where it is recommended.
    """
    notes = [
        f"{name} must not be used: {count} of its answers differ from plain decoding, and no numeric tie explains it."
        for name, count in wrong.items()
        if count
    ]

    def said(sentence: str) -> str:
        return (
            sentence if temperature is None else f"At temperature {temperature:g} {sentence[0].lower()}{sentence[1:]}"
        )

    allowed = {name: sorted(own, key=_size) for name, own in points.items() if own and not wrong.get(name)}
    sizes = sorted({point.batch_size for own in allowed.values() for point in own})
    if not sizes:
        return Recommendation(
            said("Nothing to choose from: no drafter with answers to trust was measured."), notes=notes
        )
    winners = {size: _winner(allowed, size) for size in sizes}
    first = next((size for size in sizes if winners[size]), None)
    if first is None:
        return Recommendation(said(_none_pays(allowed, sizes[0])), notes=notes)
    name = winners[first]
    assert name is not None
    before = [size for size in sizes if size < first]
    waiting = f"Plain decoding wins at batch {_listed(before)}; from there on use" if before else "Use"
    won = _at(allowed[name], first)
    assert won is not None
    given = (settings or {}).get(name, "")
    sentence = f"{waiting} {name}{given}: {won.text(interval=True)} plain decoding at batch {first}"
    paying = max(size for size in sizes if winners[size])
    sentence += "".join(_later(allowed, winners, name, size) for size in sizes if first < size <= paying)
    sentence += _off(allowed[name], paying, [size for size in sizes if size > paying])
    return Recommendation(said(f"{sentence}."), name, first, [*notes, *_close(allowed, name, first)])


def _size(point: SpeedPoint) -> int:
    return point.batch_size


def _at(own: Sequence[SpeedPoint], size: int) -> SpeedPoint | None:
    return next((point for point in own if point.batch_size == size), None)


def _winner(allowed: Points, size: int) -> str | None:
    paying = {
        name: point.speedup for name, own in allowed.items() if (point := _at(own, size)) is not None and point.pays
    }
    return max(paying, key=paying.__getitem__) if paying else None


def _later(allowed: Points, winners: Mapping[int, str | None], name: str, size: int) -> str:
    """What to do at a larger batch size, as the rest of the sentence."""
    winner, own = winners[size], _at(allowed[name], size)
    if winner == name and own is not None:
        return f", {own.text()} at batch {size}"
    if winner is not None:
        best = _at(allowed[winner], size)
        assert best is not None
        return f"; at batch {size} {winner} is faster: {best.text()}"
    return f"; nothing pays at batch {size}"


def _off(own: Sequence[SpeedPoint], paying: int, sizes: Sequence[int]) -> str:
    """Where drafting stops to pay, and what the drafter does there."""
    if not sizes:
        return ""
    found = [(size, point) for size in sizes if (point := _at(own, size)) is not None]
    told = [f"{point.text(interval=point.open)} at batch {size}" for size, point in found]
    return f"; off above batch {paying}" + (f" ({', '.join(told)})" if told else "")


def _none_pays(allowed: Points, size: int) -> str:
    nearest = {name: point for name, own in allowed.items() if (point := _at(own, size)) is not None}
    best = max(nearest, key=lambda name: nearest[name].speedup)
    point = nearest[best]
    told = f"{best}, {point.text(interval=True)} at batch {size}"
    if point.interval is None:
        return f"Not known: one question gives no interval. The fastest was {told}."
    if point.open:
        return f"No drafter pays for certain: decode plainly. The nearest is {told}, which cannot be told from plain."
    return f"No drafter pays: plain decoding wins. The nearest is {told}."


def _close(allowed: Points, name: str, size: int) -> list[str]:
    """Other drafters whose interval meets the winner's: the choice between them is open."""
    won = _at(allowed[name], size)
    assert won is not None
    assert won.interval is not None
    near = [
        f"{other} ({point.text(interval=True)})"
        for other, own in allowed.items()
        if other != name
        and (point := _at(own, size)) is not None
        and point.pays
        and point.interval is not None
        and point.interval[1] >= won.interval[0]
    ]
    return [f"Not told apart from it at batch {size}: {', '.join(near)}."] if near else []


def _listed(sizes: Sequence[int]) -> str:
    words = [str(size) for size in sizes]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def not_ties(figures: Mapping[str, Any], temperature: float) -> int:
    """Answers that differ and should not.

    Greedy answers are equal or part at a numeric tie. Above temperature 0 only the distribution is promised to be
    equal.
    """
    if temperature > 0:
        return 0
    return sum(not difference.get("tie") for difference in figures["differences"])
