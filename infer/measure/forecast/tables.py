"""What a forecast shows on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from draftsmith.infer.measure.tables import number, table_of, with_interval

BEST = "*"


def forecast_tables(results: dict[str, Any]) -> list[RenderableType]:
    """Accepted_length by length and rule of every drafter; with costs, the predicted speedups, the best one marked."""
    shown: list[RenderableType] = [Text(line) for line in forecast_notes(results)]
    for name, by_rule in results["drafters"].items():
        shown += [Text(), Text(f"accepted_length of {name}, by length of the drawn chain"), _lengths(by_rule)]
    if results["best"]:
        shown += [Text(), Text(f"costs: {results['costs']}")]
        for name, by_rule in results["drafters"].items():
            shown += [Text(), Text(f"Predicted speedup of {name}, by batch size"), _speedups(results, name, by_rule)]
        shown += [Text(), *map(Text, _advice(results))]
    return shown


def forecast_notes(results: dict[str, Any]) -> Iterator[str]:
    sampling = results["sampling"]
    how = f"temperature {sampling['temperature']:g}"
    how += f", top_k {sampling['top_k']}" if sampling["top_k"] else ""
    how += f", top_p {sampling['top_p']:g}" if sampling["top_p"] < 1 else ""
    yield f"{results['texts']} answers, {results['tokens']} tokens, drawn at {how}; nothing was decoded."


def _lengths(by_rule: dict[str, list[dict[str, Any]]]) -> Table:
    table = table_of(["length", *by_rule], left=0)
    for rows in zip(*by_rule.values(), strict=True):
        cells = [with_interval(row["accepted_length"], row["accepted_length_interval"]) for row in rows]
        table.add_row(str(rows[0]["length"]), *cells)
    return table


def _speedups(results: dict[str, Any], name: str, by_rule: dict[str, list[dict[str, Any]]]) -> Table:
    best = {(one["batch_size"], one["drafter"], one["rule"], one["length"]) for one in results["best"]}
    table = table_of(["rule", "length", *(str(one["batch_size"]) for one in results["best"])], left=1)
    for rule, rows in by_rule.items():
        for row in rows:
            cells = [
                number(one["speedup"]) + (BEST if (one["batch_size"], name, rule, row["length"]) in best else "")
                for one in row["predicted"]
            ]
            table.add_row(rule, str(row["length"]), *cells)
    return table


def _advice(results: dict[str, Any]) -> Iterator[str]:
    """What pays at which batch size."""
    yield f"{BEST} the largest speedup of its batch size."
    for one in results["best"]:
        if one["speedup"] > 1:
            yield (
                f"batch {one['batch_size']}: {one['drafter']}, chains of {one['length']}, rule {one['rule']}: "
                f"{number(one['speedup'])}x"
            )
        else:
            yield f"batch {one['batch_size']}: nothing pays ({number(one['speedup'])}x at best)"
