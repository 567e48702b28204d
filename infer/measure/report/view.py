"""What a report shows, as data: the runs grouped by temperature, each group with its verdict, each run a section.

The page, the Markdown and the pictures all take their figures from here; they come from results.json and the traces.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.infer.drafters.registry import Registry
from draftsmith.infer.measure.forecast.outlook import Outlook
from draftsmith.infer.measure.metrics import ratio
from draftsmith.infer.measure.report.charts import Series, Spot
from draftsmith.infer.measure.report.drafters import About, about
from draftsmith.infer.measure.report.runs import Readings, ReportedRun, other_settings, read
from draftsmith.infer.measure.report.traces import Example
from draftsmith.infer.measure.report.verdict import Contender, Recommendation, not_ties, recommend
from draftsmith.infer.measure.tables import number, percent


@dataclass(slots=True)
class Entry:
    """One runner in one run. `ceiling` is the oracle's accepted_length; `wrong` counts differences that are no ties."""

    series: Series
    about: About
    figures: dict[str, Any]
    ceiling: float | None
    wrong: int
    contexts: dict[int, float]
    examples: list[Example]

    @property
    def differences(self) -> list[dict[str, Any]]:
        """From plain decoding's answers; none where they need not be the same tokens."""
        return [] if self.figures.get("drawn") else list(self.figures["differences"])

    @property
    def places(self) -> list[str]:
        """Where the drafter runs; only the run itself was measured."""
        measured = self.about.runs[:1]
        return [*measured, *(f"{place} (not measured)" for place in self.about.runs[1:])]

    @property
    def spot(self) -> Spot | None:
        speedup = self.figures["speedup"]
        return None if speedup is None else Spot(speedup, self.figures["speedup_interval"])


@dataclass(slots=True)
class Section:
    """One run; its entries are ordered drafters (fastest first), plain, controls, peers."""

    run: ReportedRun
    entries: list[Entry]
    readings: Readings

    def of(self, *kinds: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.about.kind in kinds]

    def entry(self, name: str) -> Entry | None:
        return next((entry for entry in self.entries if entry.series.name == name), None)

    def answer_s(self, entry: Entry) -> float | None:
        """Mean seconds until all turns of a question are answered; in a batch, the whole batch's seconds."""
        figures, results = entry.figures, self.run.results
        rows = min(self.run.batch_size, int(results["questions"]))
        answers = figures["pairs"] * int(results.get("repeats", 1))
        seconds = ratio(figures["tokens"], figures["end_to_end_tokens_per_s"])
        return ratio(None if seconds is None else seconds * rows, answers)

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for entry in self.entries for task in entry.figures["by_category"]))

    @property
    def loops(self) -> str:
        """A sentence about looping answers; empty if there are none."""
        left_out, least = self.run.results["left_out"], self.run.results["left_out"]["min_distinct"]
        if left_out["questions"]:
            return (
                f"{left_out['questions']} of {self.run.results['questions']} prompts are left out of the figures "
                f"because plain decoding's answer loops (fewer than {percent(least)} distinct 4-grams). "
                "The figures over all prompts include them."
            )
        if self.readings.looping:
            return (
                f"Plain decoding's answer loops on {self.readings.looping} of {self.readings.answered} prompts (fewer "
                "than half of its 4-grams are distinct). They are in the figures and flatter every drafter; "
                "to leave them out, run bench with --min_distinct 0.5."
            )
        return ""


@dataclass(slots=True)
class TemperatureGroup:
    """The runs of one temperature and their verdict."""

    temperature: float
    sections: list[Section]
    verdict: Recommendation

    @property
    def chosen(self) -> tuple[Section, Entry] | None:
        """The run and the entry that the verdict recommends."""
        for section in self.sections:
            entry = section.entry(self.verdict.use) if self.verdict.use else None
            if entry is not None and section.run.batch_size == self.verdict.batch_size:
                return section, entry
        return None

    @property
    def names(self) -> list[Entry]:
        """One entry per name, from the smallest batch that has it."""
        found: dict[str, Entry] = {}
        for section in self.sections:
            for entry in section.entries:
                found.setdefault(entry.series.name, entry)
        return sorted(found.values(), key=_order)

    def first(self, name: str) -> tuple[Section, Entry]:
        """The smallest batch that has the runner."""
        return next((section, entry) for section in self.sections if (entry := section.entry(name)) is not None)

    def spots(self, name: str) -> list[Spot]:
        """Speedups of one runner, by batch size."""
        found = [(section.run.place, section.entry(name)) for section in self.sections]
        return [
            Spot(entry.spot.value, entry.spot.interval, f"at {place}")
            for place, entry in found
            if entry is not None and entry.spot is not None
        ]


@dataclass(slots=True)
class View:
    """`outlooks`: forecasts of what would pay at which batch size."""

    groups: list[TemperatureGroup]
    others: dict[str, list[str]]
    outlooks: list[Outlook] = field(default_factory=list)

    @property
    def runs(self) -> list[ReportedRun]:
        return [section.run for group in self.groups for section in group.sections]


def view(runs: Sequence[ReportedRun], registry: Registry) -> View:
    """Read the traces of all runs and group the runs by temperature."""
    abouts = [{label: about(run, label, registry) for label in run.results["drafters"]} for run in runs]
    series = _series(runs, abouts)
    sections = [_section(run, known, series) for run, known in zip(runs, abouts)]
    temperatures = sorted({run.temperature for run in runs})
    groups = []
    for temperature in temperatures:
        own = [section for section in sections if section.run.temperature == temperature]
        found = _verdict(own, named=len(temperatures) > 1)
        found.notes.extend(dict.fromkeys(section.loops for section in own if section.loops))
        groups.append(TemperatureGroup(temperature, own, found))
    return View(groups, other_settings(runs))


def _series(runs: Sequence[ReportedRun], abouts: Sequence[dict[str, About]]) -> dict[str, Series]:
    """A name has the same colour in all runs; colours are given in the order of first appearance."""
    found: dict[str, Series] = {}
    order = 0
    for run, known in zip(runs, abouts):
        for label, name in run.names.items():
            if name not in found:
                drafter = known[label].kind == "drafter"
                found[name] = Series(name, order if drafter else None)
                order += drafter
    return found


def _section(run: ReportedRun, known: dict[str, About], series: dict[str, Series]) -> Section:
    readings = read(run, [label for label, one in known.items() if one.kind == "drafter"])
    oracle = next((label for label in known if label in run.specs and run.specs[label][1].name == "oracle"), None)
    ceiling = run.results["drafters"][oracle]["accepted_length"] if oracle else None
    entries = [
        Entry(
            series=series[run.names[label]],
            about=known[label],
            figures=figures,
            ceiling=ceiling,
            wrong=not_ties(figures, run.temperature),
            contexts=readings.speedups_by_context(label, run.baseline),
            examples=readings.examples.get(label, []),
        )
        for label, figures in run.results["drafters"].items()
    ]
    return Section(run, sorted(entries, key=_order), readings)


def _order(entry: Entry) -> tuple[int, float]:
    return ("drafter", "plain", "control", "peer").index(entry.about.kind), -(entry.figures["speedup"] or 0.0)


def _verdict(sections: Sequence[Section], named: bool) -> Recommendation:
    contenders = [
        Contender(entry.series.name, entry.about.written, section.run.batch_size, entry.figures)
        for section in sections
        for entry in section.of("drafter")
    ]
    return recommend(contenders, sections[0].run.temperature, named)


def verdict_of(facts: dict[str, Any], results: dict[str, Any], registry: Registry) -> Recommendation:
    """The verdict on one run from its run.json and results.json: the one in its report."""
    run = ReportedRun.of(Path(), facts, results)
    known = {label: about(run, label, registry) for label in results["drafters"]}
    return recommend(
        [
            Contender(label, one.written, run.batch_size, results["drafters"][label])
            for label, one in known.items()
            if one.kind == "drafter"
        ],
        run.temperature,
    )


def why_not_faster(entry: Entry) -> str:
    """Where a step's time goes and how many tokens it commits, in a sentence."""
    shares, figures = entry.figures["time_shares"], entry.figures
    parts = ", ".join(f"{part} {percent(shares[part])}" for part in ("target", "draft", "overhead"))
    text = f"A step with {entry.series.name} spends: {parts}. It commits {number(figures['accepted_length'])} tokens"
    if figures.get("break_even") is not None:
        text += f" and needs {number(figures['break_even'])} to be as fast as plain decoding"
    return text + (f"; drafts that are always right reach {number(entry.ceiling)}." if entry.ceiling else ".")


def next_lines(group: TemperatureGroup) -> list[tuple[str, str]]:
    """(engine, command to copy): how to run the recommended drafter."""
    chosen = group.chosen
    run = group.sections[0].run
    target = shlex.quote(run.target or "TARGET")
    if chosen is None:
        return [("find a draft that pays on this machine", f"draftsmith plan --target {target}")]
    drafter = chosen[1].about
    words = f"draftsmith generate --target {target} --drafters {shlex.quote(drafter.written)}"
    words += f" --temperature {group.temperature:g}" if group.temperature > 0 else ""
    elsewhere = [(f"{engine} (not measured)", line) for engine, line in drafter.elsewhere.items()]
    return [("here", f'{words} --prompt "..."'), *elsewhere]
