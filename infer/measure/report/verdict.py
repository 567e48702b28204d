"""The first sentence of a report: which drafter to use, at which batch sizes, or that none pays.

A drafter pays if the whole interval of its speedup lies above 1. If the interval contains 1, the drafter cannot be
distinguished from plain decoding and is not recommended. Without an interval (fewer than MIN_PAIRS questions) nothing
is known and nothing recommended. A drafter whose answers differ from plain decoding's at temperature 0, other than by a
numeric tie, is never recommended.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from draftsmith.infer.measure.bootstrap import MIN_PAIRS
from draftsmith.infer.measure.tables import with_interval

TOO_FEW = f"fewer than {MIN_PAIRS} questions give no interval"


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


# Name -> batch size -> figures.
Points = Mapping[str, Mapping[int, SpeedPoint]]


@dataclass(frozen=True, slots=True)
class Recommendation:
    """`use` is the drafter to use at `batch_size`, if any; `notes` are warnings and close competitors."""

    sentence: str
    use: str | None = None
    batch_size: int | None = None
    notes: list[str] = field(default_factory=list)


def verdict(
    points: Mapping[str, Sequence[SpeedPoint]],
    wrong: Mapping[str, int],
    temperature: float | None = None,
    settings: Mapping[str, str] | None = None,
) -> Recommendation:
    """The recommendation.

    Args:
        points: the drafters to choose from, without controls and peers.
        wrong: by drafter, answers that differ from plain decoding's and are no ties.
        temperature: named in the sentence if given.
        settings: each drafter's options in brackets, added to its name.
    """
    notes = [
        f"{name} must not be used: {count} of its answers differ from plain decoding, and no numeric tie explains it."
        for name, count in wrong.items()
        if count
    ]
    own = {name: {point.batch_size: point for point in row} for name, row in points.items()}
    allowed = {name: row for name, row in own.items() if row and not wrong.get(name)}
    name, size, sentence = _choose(allowed, settings or {})
    if temperature is not None:
        sentence = f"At temperature {temperature:g} {sentence[0].lower()}{sentence[1:]}"
    if name is not None and size is not None:
        notes += _close(allowed, name, size)
    return Recommendation(sentence, name, size, notes)


def _choose(allowed: Points, settings: Mapping[str, str]) -> tuple[str | None, int | None, str]:
    """(drafter, batch size, sentence)."""
    sizes = sorted({size for row in allowed.values() for size in row})
    if not sizes:
        return None, None, "Nothing to choose from: no drafter with correct answers was measured."
    winners = {size: winner for size in sizes if (winner := _winner(allowed, size))}
    if not winners:
        return None, None, _none_pays(allowed, sizes[0])
    first, paying = min(winners), max(winners)
    name = winners[first]
    before = [size for size in sizes if size < first]
    use = "; ".join(_before(allowed, before)) + "; from there on use" if before else "Use"
    best = allowed[name][first].text(interval=True)
    sentence = f"{use} {name}{settings.get(name, '')}: {best} plain decoding at batch {first}"
    for size in sizes:
        if first < size <= paying:
            sentence += _later(allowed, name, winners.get(size), size)
    above = [size for size in sizes if size > paying]
    if any(_known(allowed, size) for size in above):
        sentence += f"; off above batch {paying}"
        points = [point for size, point in sorted(allowed[name].items()) if size > paying and point.interval]
        shown = [f"{point.text(interval=point.open)} at batch {point.batch_size}" for point in points]
        sentence += f" ({', '.join(shown)})" if shown else ""
    unknown = [size for size in above if not _known(allowed, size)]
    sentence += f"; not known at batch {_listed(unknown)} ({TOO_FEW})" if unknown else ""
    return name, first, f"{sentence}."


def _known(allowed: Points, size: int) -> bool:
    """Whether any drafter has an interval at this batch size."""
    return any(row[size].interval is not None for row in allowed.values() if size in row)


def _before(allowed: Points, sizes: Sequence[int]) -> list[str]:
    """What is true of the batch sizes at which no drafter pays, below the first at which one does."""
    lost, unknown = ([size for size in sizes if _known(allowed, size) is known] for known in (True, False))
    said = [f"Plain decoding wins at batch {_listed(lost)}"] if lost else []
    return said + ([f"It is not known what pays at batch {_listed(unknown)} ({TOO_FEW})"] if unknown else [])


def _listed(sizes: Sequence[int]) -> str:
    words = [str(size) for size in sizes]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _winner(allowed: Points, size: int) -> str | None:
    paying = {name: row[size].speedup for name, row in allowed.items() if size in row and row[size].pays}
    return max(paying, key=paying.__getitem__) if paying else None


def _later(allowed: Points, name: str, winner: str | None, size: int) -> str:
    """What to do at a larger batch size, as the rest of the sentence."""
    if winner is None:
        return f"; nothing pays at batch {size}" if _known(allowed, size) else f"; not known at batch {size}"
    best = allowed[winner][size].text()
    return f", {best} at batch {size}" if winner == name else f"; at batch {size} {winner} is faster: {best}"


def _none_pays(allowed: Points, size: int) -> str:
    nearest = {name: row[size] for name, row in allowed.items() if size in row}
    best = max(nearest, key=lambda name: nearest[name].speedup)
    point = nearest[best]
    shown = f"{best}, {point.text(interval=True)} at batch {size}"
    if point.interval is None:
        fastest = f"{best}, {point.text()} plain decoding at batch {size}"
        return f"It is not known which drafter pays: {TOO_FEW}. The fastest was {fastest}."
    if point.open:
        return f"No drafter pays for certain: use plain decoding. The nearest is {shown}: its interval contains 1."
    return f"No drafter pays: plain decoding wins. The nearest is {shown}."


def _close(allowed: Points, name: str, size: int) -> list[str]:
    """Other drafters that pay and whose interval overlaps the winner's."""
    won = allowed[name][size].interval
    near = [
        f"{other} ({point.text(interval=True)})"
        for other, row in allowed.items()
        if other != name
        and (point := row.get(size)) is not None
        and point.pays
        and point.interval is not None
        and won is not None
        and point.interval[1] >= won[0]
    ]
    return [f"Within the margin of error at batch {size}: {', '.join(near)}."] if near else []


@dataclass(frozen=True, slots=True)
class Contender:
    """A drafter in one run: its name, as written on the command line, and its figures in results.json."""

    name: str
    written: str
    batch_size: int
    figures: Mapping[str, Any]


def recommend(contenders: Iterable[Contender], temperature: float, named: bool = False) -> Recommendation:
    """The recommendation from the runs of one temperature, which is in the sentence if `named`."""
    points: dict[str, list[SpeedPoint]] = {}
    wrong: dict[str, int] = {}
    settings: dict[str, str] = {}
    unjudged: dict[str, int] = {}
    for one in contenders:
        name, figures, bracket = one.name, one.figures, one.written.find("[")
        wrong[name] = wrong.get(name, 0) + not_ties(figures, temperature)
        unjudged[name] = unjudged.get(name, 0) + (figures.get("not_judged") or 0)
        points.setdefault(name, [])
        if bracket >= 0 and "[" not in name:
            settings[name] = one.written[bracket:]
        if figures["speedup"] is not None:
            interval = figures["speedup_interval"]
            pair = None if interval is None else (interval[0], interval[1])
            points[name].append(SpeedPoint(one.batch_size, figures["speedup"], pair))
    found = verdict(points, wrong, temperature if named else None, settings)
    found.notes.extend(
        f"{name}: {count} of its answers differ from plain decoding and were not judged: a numeric tie or a bug."
        for name, count in unjudged.items()
        if count
    )
    return found


def not_ties(figures: Mapping[str, Any], temperature: float) -> int:
    """Answers that differ and should not: above temperature 0 only the distribution is promised to be equal.

    Those that could not be judged are counted by `not_judged` in the figures, not here.
    """
    if temperature > 0:
        return 0
    return sum(not difference.get("tie") for difference in figures["differences"]) - (figures.get("not_judged") or 0)
