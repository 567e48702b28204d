"""A plan as tables for a terminal and as a plot. Every number is one of the JSON values, in a reader's units."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from draftsmith.infer.costs.identity import machine_text, modelled_on
from draftsmith.infer.costs.roofline import TRAINING_SHARE
from draftsmith.infer.measure.forecast.outlook import source_of
from draftsmith.infer.measure.forecast.tables import outlook_table
from draftsmith.infer.measure.report import charts
from draftsmith.infer.measure.report.charts import Series
from draftsmith.infer.measure.tables import milliseconds, number, table_of


def plan_tables(report: dict[str, Any]) -> list[RenderableType]:
    """The shapes, then ranking and verdict of each batch size."""
    machine = report["machine"]
    torch = f", torch {machine['torch']}" if "torch" in machine else ""
    shown: list[RenderableType] = [
        Text(f"{machine_text(machine)}{torch}; at a context of {report['context']} tokens"),
        Text(),
        Text("Shapes"),
        shape_table(report),
        Text(),
        Text(f"A pass of one token per row, ms by batch size{_mark(report)}"),
        pass_table(report),
    ]
    if report.get("forecast"):
        shown += _forecast(report)
    for batch in report["batches"]:
        shown += [
            Text(),
            Text(_title(report, batch)),
            ranking_table(batch),
            Text(),
            needs_table(batch),
            Text(f"Verdict{_mark(report)}: {batch['verdict']}."),
        ]
    return [*shown, Text(), *(Text(line) for line in notes(report))]


def _forecast(report: dict[str, Any]) -> list[RenderableType]:
    """What would pay of the forecast draft."""
    found = report["forecast"]
    shapes = ", ".join(f"{name} is {shape}" for name, shape in found["draft_shapes"].items())
    return [
        Text(),
        Text(f"What would pay, by batch size: forecast from {source_of(found)}; {shapes}"),
        outlook_table(found["by_batch_size"]),
    ]


def _mark(report: dict[str, Any]) -> str:
    """What sets modelled figures apart from measured ones."""
    return f" ({modelled_on(report['machine'])})" if report["modelled"] else ""


def _title(report: dict[str, Any], batch: dict[str, Any]) -> str:
    plain = f"plain decoding {milliseconds(batch['plain_step_s'])} ms a step, {number(batch['plain_tokens_per_s'], 0)}"
    given = [
        f"acceptance of {what} {', '.join(number(share) for share in report[key])}"
        for key, what in (("acceptance", "chains"), ("tree_acceptance", "trees"))
        if report[key]
    ]
    return f"Batch size {batch['batch_size']}{_mark(report)}: {'; '.join([plain + ' tokens/s', *given])}"


def shape_table(report: dict[str, Any]) -> Table:
    table = table_of(["shape", "parameters", "weights", "to train", "hours", "distilled"])
    for name, row in report["shapes"].items():
        table.add_row(
            Text(_shape_name(report, name)),
            f"{row['parameters'] / 1e6:.1f}M",
            _bytes(row["weight_bytes"]),
            _bytes(row["training_bytes"]),
            number(row["hours"], 1),
            number(row["hours_distilled"], 1),
        )
    return table


def _shape_name(report: dict[str, Any], name: str) -> str:
    """With a mark where others were measured and this one was fitted to them."""
    return name if report["modelled"] or report["shapes"][name]["measured"] else f"{name} (estimated)"


def pass_table(report: dict[str, Any]) -> Table:
    batches = [str(batch["batch_size"]) for batch in report["batches"]]
    table = table_of(["shape", *batches])
    for name, row in report["shapes"].items():
        table.add_row(Text(name), *(milliseconds(row["pass_s"][batch]) for batch in batches))
    return table


def ranking_table(batch: dict[str, Any]) -> Table:
    """A line per shape at its best."""
    judged = any(row["best"] for row in batch["ranking"])
    columns = ["shape", "draft", "step ms", "drafting", "verifying"]
    table = table_of([*columns, *(["accepted_length", "speedup"] if judged else ["ceiling"])])
    for row in batch["ranking"]:
        step = row["best"] or row["ceiling"]
        table.add_row(
            Text(row["shape"]),
            step["draft"],
            *(milliseconds(step[part]) for part in ("step_s", "draft_s", "verify_s")),
            *([number(step["accepted_length"]), _times(step["speedup"])] if judged else [_times(step["ceiling"])]),
        )
    return table


def needs_table(batch: dict[str, Any]) -> Table:
    """What each shape needs: accepted_lengths, and acceptance, to be first or, if none is known, for each goal."""
    judged = any(row["best"] for row in batch["ranking"])
    columns = ["needs", "break-even", "for 1.5x", "for 2x"]
    columns += ["acceptance to be first", "ceiling"] if judged else ["acceptance for 1x", "for 1.5x", "for 2x"]
    table = table_of(columns)
    for row in batch["ranking"]:
        step = row["best"] or row["ceiling"]
        needs = [row.get("to_be_first")] if judged else list(row["needs_acceptance"].values())
        table.add_row(
            Text(row["shape"]),
            *(_reached(step, goal) for goal in ("1", "1.5", "2")),
            *("never" if need is None else number(need) for need in needs),
            *([_times(step["ceiling"])] if judged else []),
        )
    return table


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{number(ratio)}x"


def _reached(step: dict[str, Any], goal: str) -> str:
    """The accepted_length that a goal needs; "never" if it exceeds this draft's length."""
    return "never" if step["needs"][goal] > step["depth"] + 1 else number(step["needs"][goal])


def notes(report: dict[str, Any]) -> list[str]:
    lines = [
        "Break-even, for 1.5x and for 2x are accepted_lengths, including the target's own token; never: not with a "
        "draft of this length. The ceiling is the speedup if every token were accepted.",
        f"Training: {report['training']['tokens']:,} tokens at {report['training']['flops'] / 1e12:.3g} TFLOP/s "
        f"{_training_rate(report)}; hours = {report['training']['formula']}.",
    ]
    if report["modelled"]:
        lines += [
            "Modelled: a pass takes the longer of reading its weights and multiplying them, and the launches of its "
            "kernels; the loop around the passes is not included.",
            *(f"{what}: {source}." for what, source in report["machine"]["sources"].items()),
        ]
    names = {"target": "the target's passes", "shapes": "shapes from one another"}
    for name, error in report["fit_errors"].items():
        spread = f"{error['median']:.0%} (median), {error['worst']:.0%} (worst)"
        lines.append(f"Error of the fit on points left out, {names[name]}: {spread}.")
    if report["pays_up_to"] is not None:
        most = report["batches"][-1]["batch_size"]
        lines.append(
            f"At this acceptance, drafting pays at every batch size up to {most}."
            if report["pays_up_to"] >= most
            else f"At this acceptance, turn drafting off above a batch size of {report['pays_up_to']}."
        )
    else:
        lines.append("No acceptance was given: try --acceptance 0.7, shares by depth, or a result of bench or replay.")
    return lines


def _training_rate(report: dict[str, Any]) -> str:
    if not report["modelled"]:
        return "measured here"
    return f"{modelled_on(report['machine'])}, at {TRAINING_SHARE:.0%} of its arithmetic"


def draw(report: dict[str, Any], path: Path) -> None:
    """Write an SVG of speedup over the number of drafted tokens, a line per shape, a panel per batch size."""
    kind = "speedup" if report["acceptance"] else "ceiling"
    title = "predicted speedup" if report["acceptance"] else "speedup if every token were accepted"
    title += _mark(report)
    names = [_shape_name(report, name) for name in report["shapes"]]
    series = {shape: Series(name, i) for i, (shape, name) in enumerate(zip(report["shapes"], names))}
    panels = []
    for batch in report["batches"]:
        chains = [step for step in batch["steps"] if step["nodes"] == step["depth"]]
        lengths = sorted({step["depth"] for step in chains})
        lines = {shape: {lengths.index(s["depth"]): s[kind] for s in chains if s["shape"] == shape} for shape in series}
        heading = f"Batch size {batch['batch_size']}: {title}"
        drawn = [(series[shape], line) for shape, line in lines.items()]
        panels.append(
            (heading, charts.lines(heading, drawn, [*map(str, lengths)], "drafted tokens (chain)", even=True))
        )
    charts.write_svg(path, panels, list(series.values()))


def check_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Predicted and measured speedups, a line per pair."""
    table = table_of(["shape", "draft", "rows", "accepted", "measured", "predicted", "error", "step ms", "predicted"])
    for row in rows:
        table.add_row(
            Text(row["shape"]),
            str(row["length"]),
            str(row["batch_size"]),
            number(row["accepted_length"]),
            f"{number(row['measured'])}x",
            f"{number(row['predicted'])}x",
            f"{row['error']:+.1%}",
            milliseconds(row["step_s"]),
            milliseconds(row["predicted_step_s"]),
        )
    return table


def _bytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
