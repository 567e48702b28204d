"""The report of loads of servers: run folders of `draftsmith bench --server`, several side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from draftsmith.infer.measure.report import charts
from draftsmith.infer.measure.report.charts import Series
from draftsmith.infer.measure.run_folder import machine
from draftsmith.infer.measure.served.tables import notes, sentence, tables

# What a run folder of servers has in results.json, and no other.
MARK = "levels"


@dataclass(frozen=True, slots=True)
class ServedRun:
    """One run folder; `label` is empty if it is the only one of the report."""

    path: Path
    facts: dict[str, Any]
    results: dict[str, Any]
    label: str = ""

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.facts.get("config") or {})

    @property
    def sentence(self) -> str:
        return (f"{self.label}: " if self.label else "") + sentence(self.results)

    @property
    def notes(self) -> list[str]:
        return notes(self.results, self.config)

    @property
    def tables(self) -> dict[str, tuple[list[str], list[list[str]]]]:
        return tables(self.results, self.config)

    @property
    def about(self) -> str:
        """What was asked, from where, and when."""
        temperature = float(self.config.get("temperature") or 0)
        settings = "greedy" if temperature == 0 else f"temperature {temperature:g}"
        urls = ", ".join(f"{name}: {one['url']}" for name, one in self.results["servers"].items())
        asked = f"{self.results['questions']} questions, {settings}, {self.config.get('max_new_tokens')} new tokens"
        return f"{urls}; {asked}; asked from {machine(self.facts)}, {str(self.facts.get('date', 'no date'))[:10]}."


def is_served(folder: str | Path) -> bool:
    """Whether a run folder is of servers; False for one without results too."""
    try:
        found = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and MARK in found


def read_served(folders: Sequence[str | Path]) -> list[ServedRun]:
    found = []
    for folder in folders:
        path = Path(folder)
        try:
            facts, results = (
                json.loads((path / name).read_text(encoding="utf-8")) for name in ("run.json", "results.json")
            )
        except (OSError, ValueError) as problem:
            raise ValueError(f"{path} is not a finished run folder: {problem}") from problem
        if MARK not in results:
            raise ValueError(f"{path} is not about a server: give runs of `bench --server`, or none, in one report")
        found.append(ServedRun(path, facts, results, path.name if len(folders) > 1 else ""))
    return found


def page(runs: Sequence[ServedRun]) -> str:
    """The HTML page; the template engine escapes all text."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    source = files(__package__).joinpath("served.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        runs=runs,
        pictures=pictures(runs),
        series=[one for one, *_ in _lines(runs)],
        swatch=charts.swatch,
        provenance=lambda run: json.dumps(run.facts, indent=1, ensure_ascii=False),
        css=Markup(files(charts.__package__).joinpath("report.css").read_text(encoding="utf-8")),
    )


def markdown(runs: Sequence[ServedRun], names: Sequence[Path], cell: Callable[[str], str]) -> str:
    """The sentences and the tables as Markdown; `names` are pictures beside it, `cell` escapes a text."""
    parts: list[str] = []
    for run in runs:
        parts += [f"## {cell(run.sentence)}", cell(run.about)]
        for title, (heads, rows) in run.tables.items():
            lines = [heads, ["---"] * len(heads), *rows]
            parts += [f"### {cell(title)}", "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)]
        parts += [cell(note) for note in run.notes]
    parts += [f"![{path.stem}]({path.name})" for path in names]
    return "\n\n".join(parts) + "\n"


def _lines(runs: Sequence[ServedRun]) -> list[tuple[Series, str, ServedRun]]:
    """A series for every server of every run."""
    found = [(name, run) for run in runs for name in run.results["servers"]]
    return [(Series(f"{run.label} {name}".strip(), order), name, run) for order, (name, run) in enumerate(found)]


def pictures(runs: Sequence[ServedRun]) -> dict[str, tuple[str, Markup]]:
    """File ending -> heading and picture."""
    many = sorted({level["concurrency"] for run in runs for level in run.results["levels"]})
    kinds = {
        "speed": ("tokens/s of all requests together", "tokens_per_s", 1.0),
        "ttft": ("Wait for the first text, median, ms", "ttft_p50_s", 1e3),
        "tpot": ("Time per token after it, median, ms", "tpot_p50_s", 1e3),
    }
    made = {}
    for ending, (heading, key, factor) in kinds.items():
        rows = [
            (
                series,
                {
                    many.index(level["concurrency"]): factor * level["servers"][name][key]
                    for level in run.results["levels"]
                    if level["servers"][name][key] is not None
                },
            )
            for series, name, run in _lines(runs)
        ]
        picture = charts.lines(heading, rows, list(map(str, many)), "requests at a time", unit="")
        if picture:
            made[ending] = heading, picture
    return made


def write_pictures_beside(runs: Sequence[ServedRun], place: Path) -> list[Path]:
    """Write NAME-speed.svg, -ttft.svg and -tpot.svg beside the page."""
    paths = []
    for ending, panel in pictures(runs).items():
        paths.append(place.with_name(f"{place.stem}-{ending}.svg"))
        charts.write_svg(paths[-1], [panel], [one for one, *_ in _lines(runs)])
    return paths
