"""A report of one or more run folders: a page, the same as Markdown, and pictures.

    report.html             one file, no script, loads nothing
    report.md               verdict and tables, for a pull request or a README
    report-*.svg            the page's main pictures

Only finished runs are read; nothing is loaded or measured.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from markupsafe import Markup, escape

from draftsmith.infer.drafters.registry import Registry
from draftsmith.infer.files.atomic import written_beside
from draftsmith.infer.measure.forecast.outlook import NAME, Outlook
from draftsmith.infer.measure.report import charts
from draftsmith.infer.measure.report.charts import Series, Spot
from draftsmith.infer.measure.report.runs import read_runs
from draftsmith.infer.measure.report.traces import Piece
from draftsmith.infer.measure.report.view import (
    Entry,
    Section,
    TemperatureGroup,
    View,
    next_lines,
    view,
    why_not_faster,
)
from draftsmith.infer.measure.run_folder import machine
from draftsmith.infer.measure.served import page as served
from draftsmith.infer.measure.served.page import is_served
from draftsmith.infer.measure.tables import equal_text, milliseconds, number, percent, with_interval

# Differences listed per drafter; results.json has all of them.
SHOWN = 25
# A depth at which fewer candidates were reached is not shown.
MIN_REACHED = 30
TARGET = "target"


@dataclass(frozen=True, slots=True)
class Report:
    """The files written; `verdicts` has one sentence per temperature, `notes` the warnings beside them."""

    page: Path
    markdown: Path
    pictures: list[Path]
    verdicts: list[str]
    notes: list[str]


def write_report(
    folders: Sequence[str | Path], out: str | Path | None, registry: Registry, forecasts: Sequence[str | Path] = ()
) -> Report:
    """Write the report of `folders` to `out`, by default report.html in the first folder. `forecasts`: files to show
    besides those that the folders hold."""
    place = Path(out) if out else Path(folders[0] if folders else ".") / "report.html"
    if place.is_dir() or place.suffix != ".html":
        raise ValueError(f"cannot write the report to {place}: name a file that ends in .html")
    if any(map(is_served, folders)):
        return _served_report(folders, place)
    own = [path for folder in folders if (path := Path(folder) / NAME).is_file()]
    outlooks = [Outlook.load(path) for path in (*own, *forecasts)]
    seen = view(read_runs(folders), registry)
    seen.outlooks = outlooks
    html = page(seen)
    pictures = write_pictures(seen, place)
    for path, text in ((place, html), (place.with_suffix(".md"), markdown(seen, pictures))):
        with written_beside(path) as file:
            file.write(text)
    notes = list(dict.fromkeys(note for group in seen.groups for note in group.verdict.notes))
    return Report(place, place.with_suffix(".md"), pictures, [group.verdict.sentence for group in seen.groups], notes)


def _served_report(folders: Sequence[str | Path], place: Path) -> Report:
    """The report of runs of `bench --server`."""
    runs = served.read_served(folders)
    pictures = served.write_pictures_beside(runs, place)
    texts = {place: served.page(runs), place.with_suffix(".md"): served.markdown(runs, pictures, _cell)}
    for path, text in texts.items():
        with written_beside(path) as file:
            file.write(text)
    notes = list(dict.fromkeys(note for run in runs for note in run.notes))
    return Report(place, place.with_suffix(".md"), pictures, [run.sentence for run in runs], notes)


def write_pictures(view: View, page: Path) -> list[Path]:
    """Write NAME-speedup.svg, -length.svg and -depth.svg of the first temperature; those without data are skipped."""
    group, section = view.groups[0], view.groups[0].sections[0]
    made = {
        "speedup": ("Speedup over plain decoding, with 95 % intervals", charts.speedups(speeds(group)), []),
        "length": ("accepted_length over the cost of a step", charts.lengths(length_points(section)), []),
        "depth": ("Acceptance by depth", depth_picture(section), [series for series, _ in depths(section)[0]]),
    }
    found = {kind: one for kind, one in made.items() if one[1]}
    for kind, (heading, picture, legend) in found.items():
        charts.write_svg(page.with_name(f"{page.stem}-{kind}.svg"), [(heading, picture)], legend)
    return [page.with_name(f"{page.stem}-{kind}.svg") for kind in found]


def page(view: View) -> str:
    """The HTML page; the template engine escapes all text."""
    import jinja2

    def text(name: str) -> str:
        return files(__package__).joinpath(name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    functions = (checked, context_picture, depth_picture, equal_text, exit_counts, length_points, machine, next_lines,
                 outlook_picture, outlook_rows, outlook_series, provenance, share_rows, source_css, speeds, token,
                 why_not_faster, milliseconds, number, percent)  # fmt: skip
    environment.globals |= {function.__name__: function for function in functions}
    environment.filters["shell"] = lambda words: shlex.join(map(str, words))
    return environment.from_string(text("report.html.j2")).render(
        view=view,
        sections=[section for group in view.groups for section in group.sections],
        facts=headline(view),
        charts=charts,
        outlook_head=OUTLOOK_HEAD,
        css=Markup(text("report.css")),
        shown=SHOWN,
    )


def headline(view: View) -> dict[str, str]:
    """What was measured where, from the first run."""
    run = view.runs[0]
    temperatures = sorted({one.temperature for one in view.runs})
    settings = ", ".join("greedy" if value == 0 else f"temperature {value:g}" for value in temperatures)
    if run.config.get("max_new_tokens"):
        settings += f", {run.config['max_new_tokens']} new tokens"
    versions = run.facts.get("versions") or {}
    return {
        "target": run.target or "unknown target (run.json does not name it)",
        "questions": str(run.results["questions"]),
        "settings": settings,
        "machine": machine(run.facts),
        "date": str(run.facts.get("date", "no date"))[:10],
        "version": str(versions.get("draftsmith", "")),
    }


def checked(sections: Sequence[Section]) -> str:
    """How many answers equal plain decoding's, and why the others differ."""
    runs = [entry.figures for section in sections for entry in section.of("drafter", "control")]
    figures = [one for one in runs if not one.get("drawn")]
    equal, ties, errors, total = (
        sum(one.get(key) or 0 for one in figures) for key in ("equal", "ties", "errors", "total")
    )
    wrong = sum(entry.wrong for section in sections for entry in section.entries if entry.about.kind != "peer")
    if not runs:
        return "Nothing to compare: only plain decoding ran."
    drawn = [one for one in runs if one.get("drawn")]
    apart = f"{sum(one['total'] for one in drawn):,} answers come from drawn drafts: they have plain decoding's "
    apart += f"distribution, not its tokens; {sum(one['errors'] for one in drawn):,} failed."
    if not total:
        return apart
    text = f"{equal:,} of {total:,} answers of the drafters and controls equal plain decoding's, token by token"
    other = total - equal - errors
    if other and sections[0].run.temperature > 0:
        text += f"; {other:,} differ: above temperature 0 only the distribution is promised"
    elif other:
        unjudged = sum(one.get("not_judged") or 0 for one in figures)
        text += f"; {ties:,} differ after a numeric tie of two logits"
        text += f", and {wrong:,} without one: A BUG" if wrong else ", none otherwise" if not unjudged else ""
        reasons = {section.run.results["not_judged"] for section in sections if section.run.results.get("not_judged")}
        text += f"; {unjudged:,} were not judged: {'; '.join(sorted(reasons))}" if unjudged else ""
    text += f"; {errors:,} failed." if errors else "."
    return f"{text} {apart}" if drawn else text


def speeds(group: TemperatureGroup) -> list[tuple[Series, list[Spot]]]:
    """Speedups of drafters and peers; controls are left out because they would set the scale."""
    shown = [entry.series for entry in group.names if entry.about.kind in ("drafter", "peer")]
    return [(series, spots) for series in shown if (spots := group.spots(series.name))]


def length_points(section: Section) -> list[tuple[Series, float, float]]:
    return [
        (entry.series, entry.figures["break_even"], entry.figures["accepted_length"])
        for entry in section.of("drafter", "plain")
        if entry.figures["break_even"] and entry.figures["accepted_length"]
    ]


def share_rows(section: Section) -> list[tuple[str, dict[str, float | None]]]:
    return [(entry.series.name, entry.figures["time_shares"]) for entry in section.of("drafter", "plain")]


def depths(section: Section) -> tuple[list[tuple[Series, dict[int, float]]], list[str]]:
    """(acceptance by depth of each drafter, column names), as deep as at least MIN_REACHED candidates were reached."""
    found = []
    for entry in section.of("drafter"):
        rows = [row for row in entry.figures["by_depth"] if row["reached"] >= MIN_REACHED]
        if rows:
            found.append((entry.series, {row["depth"] - 1: row["share"] for row in rows}))
    deepest = max((place for _, points in found for place in points), default=-1)
    return found, [str(at + 1) for at in range(deepest + 1)]


def depth_picture(section: Section) -> Markup:
    return charts.lines("Acceptance by depth", *depths(section), "depth", percent=True)


def context_picture(section: Section) -> Markup:
    drafters = [entry for entry in section.of("drafter") if entry.contexts]
    starts = sorted({start for entry in drafters for start in entry.contexts})
    rows = [
        (entry.series, {starts.index(start): speedup for start, speedup in entry.contexts.items()})
        for entry in drafters
    ]
    columns = [f"{start}–{2 * start - 1}" for start in starts]
    return charts.lines("Speedup by context length", rows, columns, "tokens before the step", even=True)


def exit_counts(entry: Entry) -> dict[str, int]:
    return {f"{layers} layers": count for layers, count in entry.figures["by_exit"].items()}


def source_css(entry: Entry) -> dict[str, str]:
    """A colour for each source: the drafter's own for the first, the next ones for the others."""
    pieces = (piece for example in entry.examples for turn in example.turns for piece in turn.pieces)
    names = sorted({piece.source for piece in pieces} - {"", TARGET})
    return {name: f"s{((entry.series.order or 0) + number) % 8}" for number, name in enumerate(names)}


def token(piece: Piece, css: dict[str, str]) -> Markup:
    """A token in its source's colour."""
    if not piece.source:
        return escape(piece.text)
    classes = [f"d {css[piece.source]}" if piece.source in css else "o", *(["b"] if piece.begins else [])]
    return Markup('<i class="{}">{}</i>').format(" ".join(classes), piece.text)


def outlook_picture(outlook: Outlook) -> Markup:
    """The largest predicted speedup by batch size, a line for each rule."""
    columns = [str(batch["batch_size"]) for batch in outlook.batches]
    rows = [
        (series, {at: batch["rules"][series.name]["speedup"] for at, batch in enumerate(outlook.batches)})
        for series in outlook_series(outlook)
    ]
    return charts.lines("Predicted speedup by batch size", rows, columns, "batch size", even=True)


def outlook_series(outlook: Outlook) -> list[Series]:
    return [Series(rule, order) for order, rule in enumerate(outlook.rules)]


def outlook_rows(outlook: Outlook) -> list[list[str]]:
    """Batch size, plain tokens/s, then of each rule the draft, its accepted_length, tokens/s and speedup."""
    found = []
    for batch in outlook.batches:
        for rule, cell in batch["rules"].items():
            found.append([
                str(batch["batch_size"]), number(batch["plain_tokens_per_s"], 1), rule,
                f"{cell['drafter']} {cell['draft']}",
                with_interval(cell["accepted_length"], cell["accepted_length_interval"]),
                number(cell["tokens_per_s"], 1), with_interval(cell["speedup"], cell["speedup_interval"]),
            ])  # fmt: skip
    return found


OUTLOOK_HEAD = ["batch", "plain tokens/s", "rule", "draft", "accepted_length", "tokens/s", "speedup"]


def provenance(section: Section) -> str:
    """run.json without the command, which is shown above it."""
    facts = {key: value for key, value in section.run.facts.items() if key != "command"}
    return json.dumps(facts, indent=1, ensure_ascii=False)


def markdown(view: View, pictures: Sequence[Path] = ()) -> str:
    """The verdict and the tables as Markdown; `pictures` are files beside it."""
    facts = headline(view)
    where = f"{facts['target']}, {facts['questions']} questions, {facts['settings']}"
    parts = [_cell(f"{where}; {facts['machine']}, {facts['date']}.")]
    for group in view.groups:
        parts += _group(group)
    for outlook in view.outlooks:
        rows = [OUTLOOK_HEAD, ["---"] * len(OUTLOOK_HEAD), *outlook_rows(outlook)]
        parts.append(f"## What would pay at which batch size\n\nForecast from {_cell(outlook.source)}.")
        parts.append("\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows))
    if view.others:
        parts.append("The runs differ in more than batch size and temperature:")
        parts.append("\n".join(f"- {_cell(key)}: {_cell('; '.join(values))}" for key, values in view.others.items()))
    parts += [f"![{path.stem}]({path.name})" for path in pictures]
    return "\n\n".join(parts) + "\n"


def _group(group: TemperatureGroup) -> list[str]:
    parts = [f"## {_cell(group.verdict.sentence)}", *(_cell(note) for note in group.verdict.notes)]
    if group.chosen:
        parts.append(_cell(why_not_faster(group.chosen[1])))
    for section in group.sections:
        rows = [HEAD, ["---"] * len(HEAD), *(_row(section, entry) for entry in section.entries)]
        parts.append(f"### {_cell(section.run.label)}")
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
        parts.append(checked([section]))
    where, line = next_lines(group)[0]
    return [*parts, f"Next ({where}):\n\n```sh\n{' '.join(line.split())}\n```"]


HEAD = ["drafter", "speedup", "tokens/s", "answer latency (s)", "all prompts", "accepted_length", "break-even",
        "p95 step, ms", "overhead", "equal", "adds to memory", "cost to make", "runs in"]  # fmt: skip


def _row(section: Section, entry: Entry) -> list[str]:
    figures, everything = entry.figures, entry.figures.get("all_questions")
    end_to_end = "" if figures["speedup_of"] == "decode" else " (end to end)"
    cells = [
        entry.series.name,
        with_interval(figures["speedup"], figures["speedup_interval"]) + end_to_end,
        number(figures["tokens_per_s"], 1),
        number(section.answer_s(entry)),
        with_interval(everything["speedup"], everything["speedup_interval"]) if everything else "the same",
        number(figures["accepted_length"]),
        number(figures["break_even"]),
        milliseconds(figures["p95_step_s"]),
        percent(figures["overhead"]),
        equal_text(figures),
        entry.about.adds or "-",
        entry.about.made or "-",
        ", ".join(entry.places),
    ]
    return [_cell(cell) for cell in cells]


def _cell(text: str) -> str:
    """Text on one line with Markdown's and HTML's marks escaped."""
    for mark, written in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|")):
        text = text.replace(mark, written)
    return " ".join(text.split())
