"""The results of a calibration as JSON and as tables. Every number shown is one of the JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from draftsmith.infer.measure.calibrate.advice import best_speedup, next_steps
from draftsmith.infer.measure.calibrate.fit import Calibrated
from draftsmith.infer.measure.tables import milliseconds, number, percent, table_of

# The passes whose cost is shown: one row of TOKENS tokens after CONTEXT committed ones.
CONTEXT, TOKENS = 256, (1, 4, 16)


def results(
    found: Mapping[float, Mapping[str, Calibrated]], files: Mapping[str, Mapping[str, str]], **run: Any
) -> dict[str, Any]:
    """The JSON of a run over `found`, by temperature; `run` holds what is the same for all drafters.

    A drafter's figures are those of the first temperature; those of further ones are in its `at`.
    """
    (first, *further) = found
    drafters = {}
    for label, one in found[first].items():
        drafters[label] = _one(one) | dict(files[label])
        if further:
            drafters[label]["at"] = {f"{t:g}": _one(found[t][label]) for t in further}
    return run | {"temperature": first, "temperatures": list(found), "drafters": drafters}


def _one(found: Calibrated) -> dict[str, Any]:
    row: dict[str, Any] = {"home": found.home, "sources": found.scores, "covered_ece": found.covered_error}
    if found.costs is not None:
        row["overhead_s"] = found.costs.overhead
        shares = [one["first_accepted"] for one in found.scores.values() if one.get("first_accepted") is not None]
        row["best_speedup"] = best_speedup(found.costs, max(shares), CONTEXT) if shares else None
        row["passes"] = {
            name: {
                "seconds": {str(tokens): cost.even(1, tokens, CONTEXT) for tokens in TOKENS},
                "relative_error": found.cost_error[name],
            }
            for name, cost in found.costs.passes.items()
        }
    return row


def calibration_tables(report: Mapping[str, Any]) -> list[RenderableType]:
    drafters = _by_temperature(report)
    files = [Text(f"{label}: {one[kind]}") for label, one in drafters.items() for kind in ("calibration", "costs")
             if kind in one]  # fmt: skip
    temperatures = ", ".join(f"{one:g}" for one in report["temperatures"])
    note = (
        f"{report['answers']} answers to {report['prompts']} prompts, {report['tokens']} tokens, temperature "
        f"{temperatures}; {report['left_out']} looping answers left out. Fitted to half of the prompts; errors are "
        "measured on the other half."
    )
    tables: list[RenderableType] = [
        *(Text("Candidates: share accepted, of all and of each node's likeliest"), _candidates(drafters), Text()),
        *(Text("Calibration error (ECE), of all and of each node's likeliest"), _errors(drafters), Text()),
    ]
    if any("passes" in one for one in drafters.values()):
        tables += [Text(f"Passes of one row after {CONTEXT} tokens: ms by number of tokens"), _passes(drafters), Text()]
    return [*tables, Text(note), *files, *map(Text, next_steps(report))]


def _by_temperature(report: Mapping[str, Any]) -> dict[str, Any]:
    """The drafters, those of further temperatures under a name with the temperature."""
    found = {}
    for label, one in report["drafters"].items():
        found[label] = one
        found |= {f"{label} T={temperature}": row for temperature, row in one.get("at", {}).items()}
    return found


def _candidates(drafters: Mapping[str, Any]) -> Table:
    columns = ["drafter", "source", "fit", "fitted to", "held out", "accepted", "likeliest"]
    table = table_of(columns, left=2)
    for label, one in drafters.items():
        for source, row in one["sources"].items():
            shares = (percent(row.get(key)) for key in ("accepted", "first_accepted"))
            table.add_row(
                Text(label), Text(source), row["method"], str(row["fitted_to"]), str(row["observations"]), *shares
            )
    return table


def _errors(drafters: Mapping[str, Any]) -> Table:
    table = table_of(["drafter", "source", *("raw", "one curve", "by rank"), "raw", "one curve", "by rank"],
                     left=2)  # fmt: skip
    keys = [prefix + key for prefix in ("", "first_") for key in ("ece_before", "ece_one_curve", "ece_after")]
    for label, one in drafters.items():
        for source, row in one["sources"].items():
            table.add_row(Text(label), Text(source), *(_thousandths(row.get(key)) for key in keys))
    return table


def _passes(drafters: Mapping[str, Any]) -> Table:
    columns = ["drafter", "pass", *map(str, TOKENS), "error", "overhead ms"]
    table = table_of(columns, left=2)
    for label, one in drafters.items():
        for name, row in one.get("passes", {}).items():
            times = [milliseconds(seconds) for seconds in row["seconds"].values()]
            table.add_row(
                Text(label), Text(name), *times, percent(row["relative_error"]), milliseconds(one["overhead_s"])
            )
    return table


def _thousandths(value: float | None) -> str:
    return number(value, 3)
