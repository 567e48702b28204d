"""The report as Markdown: the verdict and the table, for a pull request or a README. Figures are the view's."""

from __future__ import annotations

from collections.abc import Sequence

from draftsmith.infer.measure.report.page import checked, headline
from draftsmith.infer.measure.report.view import Entry, TemperatureGroup, View, next_lines, why_not_more
from draftsmith.infer.measure.tables import milliseconds, number, percent, with_interval


def markdown(view: View, pictures: Sequence[str] = ()) -> str:
    """The whole text; `pictures` are file names beside it."""
    facts = headline(view)
    where = f"{facts['target']}, {facts['questions']} questions, {facts['settings']}"
    parts = [_cell(f"{where}; {facts['machine']}, {facts['date']}.")]
    for group in view.groups:
        parts += _group(group)
    if view.others:
        parts.append("The runs differ in more than batch size and temperature:")
        parts.append("\n".join(f"- {_cell(key)}: {_cell('; '.join(values))}" for key, values in view.others.items()))
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    return "\n\n".join(parts) + "\n"


def _group(group: TemperatureGroup) -> list[str]:
    parts = [f"## {_cell(group.verdict.sentence)}", *(_cell(note) for note in group.verdict.notes)]
    if group.chosen:
        parts.append(_cell(why_not_more(group.chosen[1])))
    for section in group.sections:
        parts.append(f"### {_cell(section.run.label)}")
        parts.append("\n".join([_line(_HEAD), _line(["---"] * len(_HEAD)), *(_row(one) for one in section.entries)]))
        parts += [checked([section]), *([section.loops] if section.loops else [])]
    where, line = next_lines(group)[0]
    return [*parts, f"Next ({where}):\n\n```sh\n{' '.join(line.split())}\n```"]


_HEAD = ["drafter", "speedup", "all prompts", "accepted_length", "break-even", "p95 step, ms", "overhead", "equal",
         "adds to memory", "cost to make", "runs in"]  # fmt: skip


def _row(entry: Entry) -> str:
    figures, everything = entry.figures, entry.figures.get("all_questions")
    end_to_end = "" if figures["speedup_of"] == "decode" else " (end to end)"
    equal = f"{figures['equal']}/{figures['total']}" + (f" + {figures['ties']} ties" if figures.get("ties") else "")
    cells = [
        entry.series.name,
        with_interval(figures["speedup"], figures["speedup_interval"]) + end_to_end,
        with_interval(everything["speedup"], everything["speedup_interval"]) if everything else "the same",
        number(figures["accepted_length"]),
        number(figures["break_even"]),
        milliseconds(figures["p95_step_s"]),
        percent(figures["overhead"]),
        equal,
        entry.about.adds or "-",
        entry.about.made or "-",
        ", ".join(entry.about.runs),
    ]
    return _line([_cell(cell) for cell in cells])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Text that stays text: no column, tag or line of Markdown begins in it."""
    for mark, written in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|")):
        text = text.replace(mark, written)
    return " ".join(text.split())
