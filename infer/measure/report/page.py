"""The page: the view's figures handed to the template, with the words and the order that a reader needs.

One file that needs no other and no network: style and pictures are in it, there is no script, and a content policy
forbids loading anything. All text is escaped by the template engine. What the figures are is the view's to know.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from markupsafe import Markup, escape

from draftsmith.infer.measure.report import charts
from draftsmith.infer.measure.report.charts import Series, Spot
from draftsmith.infer.measure.report.examples import Piece
from draftsmith.infer.measure.report.runs import machine
from draftsmith.infer.measure.report.view import Entry, Section, TemperatureGroup, View, next_lines, why_not_more
from draftsmith.infer.measure.tables import milliseconds, number, percent

# So many differences of a drafter are listed; results.json has all of them.
SHOWN = 25
TARGET = "target"


def page(view: View) -> str:
    """The whole HTML text."""
    import jinja2

    def text(name: str) -> str:
        return files("draftsmith.infer.measure.report").joinpath(name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    functions = (checked, commands_of, compared, context_picture, depth_picture, exit_counts, explained, has_peers,
                 left_out, length_points, machine, next_lines, provenance, share_rows, source_css, sources, speeds,
                 token, why_not_more, milliseconds, number, percent)  # fmt: skip
    environment.globals |= {function.__name__: function for function in functions}
    return environment.from_string(text("report.html.j2")).render(
        view=view,
        sections=[section for group in view.groups for section in group.sections],
        facts=headline(view),
        charts=charts,
        css=Markup(text("report.css")),
        shown=SHOWN,
    )


def headline(view: View) -> dict[str, str]:
    """What was measured where, in the words of the first run."""
    run = view.runs[0]
    temperatures = sorted({one.temperature for one in view.runs})
    settings = ", ".join("greedy" if value == 0 else f"temperature {value:g}" for value in temperatures)
    if run.config.get("max_new_tokens"):
        settings += f", {run.config['max_new_tokens']} new tokens"
    versions = run.facts.get("versions") or {}
    return {
        "target": run.target or "a target that run.json does not name",
        "questions": str(run.results["questions"]),
        "settings": settings,
        "machine": machine(run.facts),
        "date": str(run.facts.get("date", "no date"))[:10],
        "version": str(versions.get("draftsmith", "")),
    }


def checked(sections: Sequence[Section]) -> str:
    """How many answers equal plain decoding's, and what the others are."""
    sums = [section.checked for section in sections]
    equal, ties, errors, total = (sum(column) for column in zip(*sums))
    wrong = sum(entry.wrong for section in sections for entry in section.entries if entry.about.kind != "peer")
    if not total:
        return "Nothing was compared: plain decoding ran alone."
    told = f"{equal:,} of {total:,} answers of the drafters and controls equal plain decoding's, token by token"
    other = total - equal - errors
    if sections[0].run.temperature > 0:
        told += (
            f"; {other:,} are other draws: above temperature 0 the distribution is promised, not the tokens"
            if other
            else ""
        )
    elif other:
        told += f"; {ties:,} part from it at a numeric tie of two logits"
        told += f", and {wrong:,} for no reason that rounding gives: A BUG" if wrong else ", none otherwise"
    return f"{told}; {errors:,} failed." if errors else f"{told}."


def speeds(group: TemperatureGroup) -> list[tuple[Series, list[Spot]]]:
    """The drafters and peers; a control's speed says nothing about what to use, and would set the scale."""
    shown = [entry for entry in group.names if entry.about.kind in ("drafter", "peer")]
    rows = [(entry.series, group.spots(entry.series.name)) for entry in shown]
    return [(series, spots) for series, spots in rows if spots]


def has_peers(group: TemperatureGroup) -> bool:
    return any(section.of("peer") for section in group.sections)


def left_out(group: TemperatureGroup) -> bool:
    return any(section.run.results["left_out"]["questions"] for section in group.sections)


def compared(section: Section) -> list[Entry]:
    return section.of("drafter", "peer")


def length_points(section: Section) -> list[tuple[Series, float, float]]:
    return [
        (entry.series, entry.figures["break_even"], entry.figures["accepted_length"])
        for entry in section.of("drafter", "plain")
        if entry.figures["break_even"] and entry.figures["accepted_length"]
    ]


def share_rows(section: Section) -> list[tuple[str, dict[str, float | None]]]:
    return [(entry.series.name, entry.figures["time_shares"]) for entry in section.of("drafter", "plain")]


def depths(section: Section) -> tuple[list[tuple[Series, dict[int, float]]], list[str]]:
    """Lines of acceptance over depth, as far as a drafter reached thirty candidates: fewer say nothing."""
    found = [
        (entry.series, {row["depth"] - 1: row["share"] for row in entry.figures["by_depth"] if row["reached"] >= 30})
        for entry in section.of("drafter")
    ]
    deepest = max((place for _, points in found for place in points), default=-1)
    return [(series, points) for series, points in found if points], [str(at + 1) for at in range(deepest + 1)]


def contexts(section: Section) -> tuple[list[tuple[Series, dict[int, float]]], list[str]]:
    """Lines of speedup over slices of context length."""
    starts = sorted({start for entry in section.of("drafter") for start in entry.contexts})
    rows = [
        (entry.series, {starts.index(start): speedup for start, speedup in entry.contexts.items()})
        for entry in section.of("drafter")
        if entry.contexts
    ]
    return rows, [f"{start}–{2 * start - 1}" for start in starts]


def depth_picture(section: Section) -> Markup:
    return charts.lines("Acceptance by depth", *depths(section), "depth", percent=True)


def context_picture(section: Section) -> Markup:
    return charts.lines("Speedup by context length", *contexts(section), "tokens before the step", even=True)


def exit_counts(entry: Entry) -> dict[str, int]:
    return {f"{layers} layers": count for layers, count in entry.figures["by_exit"].items()}


def sources(section: Section) -> list[tuple[Entry, str, dict[str, Any]]]:
    return [
        (entry, source, row) for entry in section.of("drafter") for source, row in entry.figures["by_source"].items()
    ]


def explained(section: Section) -> list[Entry]:
    return [entry for entry in section.entries if entry.examples]


def source_css(entry: Entry) -> dict[str, str]:
    """Each source's colour: the drafter's own for its first source, the next ones for further sources."""
    pieces = (piece for example in entry.examples for turn in example.turns for piece in turn.pieces)
    names = list(dict.fromkeys(piece.source for piece in pieces if piece.source not in ("", TARGET)))
    first = entry.series.order or 0
    return {name: f"s{(first + number) % 8}" for number, name in enumerate(sorted(names))}


def token(piece: Piece, css: dict[str, str]) -> Markup:
    """A token in its source's colour."""
    if not piece.source:
        return escape(piece.text)
    classes = [f"d {css[piece.source]}" if piece.source in css else "o", *(["b"] if piece.begins else [])]
    return Markup('<i class="{}">{}</i>').format(" ".join(classes), piece.text)


def commands_of(section: Section) -> str:
    return shlex.join(str(word) for word in section.run.facts.get("command") or [])


def provenance(section: Section) -> str:
    """run.json without the command, which stands above it."""
    facts = {key: value for key, value in section.run.facts.items() if key != "command"}
    return json.dumps(facts, indent=1, ensure_ascii=False)
