"""What a forecast shows on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from draftsmith.infer.measure.forecast.outlook import TREES, how_drawn, rows_of
from draftsmith.infer.measure.tables import number, table_of, with_interval

BEST = "*"


def forecast_tables(results: dict[str, Any]) -> list[RenderableType]:
    """Accepted_length by length and rule of every drafter, and of trees; with costs, the predicted speedups, the best
    one marked."""
    shown: list[RenderableType] = [Text(line) for line in forecast_notes(results)]
    greedy = not results["sampling"]["temperature"]
    kind = "chain of likeliest tokens" if greedy else "drawn chain"
    for name, by_rule in results["drafters"].items():
        shown += [Text(), Text(f"accepted_length of {name}, by length of the {kind}"), _lengths(by_rule, greedy)]
    for name, rows in results["trees"].items():
        shown += [Text(), Text(f"accepted_length of {name}, by tree of likeliest tokens"), _trees(rows)]
    if results["trees"]:
        shown += [Text(line) for line in _about_trees(results)]
    if results["by_batch_size"]:
        mark = f" ({results['modelled']})" if results["modelled"] else ""
        shown += [Text(), Text(f"costs: {results['costs']}")]
        for name in results["drafters"]:
            shown += [Text(), Text(f"Predicted speedup of {name}{mark}, by batch size"), _speedups(results, name)]
        shown += [Text(), Text(f"What would pay{mark}, by batch size"), outlook_table(results["by_batch_size"])]
        shown += [Text(), *map(Text, _advice(results))]
    return shown


def forecast_notes(results: dict[str, Any]) -> Iterator[str]:
    how = how_drawn(results["sampling"])
    yield f"{results['texts']} answers, {results['tokens']} tokens, {how}; nothing was decoded."


def _lengths(by_rule: dict[str, list[dict[str, Any]]], greedy: bool) -> Table:
    heads = ["any rule"] if greedy else list(by_rule)
    table = table_of(["length", *heads], left=0)
    for rows in zip(*by_rule.values(), strict=True):
        cells = [with_interval(row["accepted_length"], row["accepted_length_interval"]) for row in rows]
        table.add_row(str(rows[0]["length"]), *cells)
    return table


def _trees(rows: Sequence[dict[str, Any]]) -> Table:
    table = table_of(["tree", "nodes/step", "accepted_length", "by"], left=1)
    for row in rows:
        length = with_interval(row["accepted_length"], row["accepted_length_interval"])
        table.add_row(row["draft"], number(row["nodes_per_step"], 1), length, row["by"])
    return table


def _about_trees(results: dict[str, Any]) -> Iterator[str]:
    """What each kind of forecast rests on, and what it leaves open."""
    ways = {row["by"] for rows in results["trees"].values() for row in rows}
    if "ranks" in ways:
        yield (
            "ranks: exact for trees that give every node of a depth as many children. They do not say what a tree "
            "that grows best first holds, which depends on branches that are not in the texts."
        )
    if "replay" in ways:
        yield "replay: the drafter grew these trees along the texts, without costs or calibration."
    if results["sampling"]["temperature"]:
        yield "Trees of drawn tokens are not forecast: that takes the target's whole distributions."


def _speedups(results: dict[str, Any], name: str) -> Table:
    best = {(one["batch_size"], one["drafter"], one["rule"], one["draft"]) for one in results["best"]}
    table = table_of(["rule", "draft", *(str(one["batch_size"]) for one in results["best"])], left=1)
    for drafter, rule, row in rows_of(results):
        if drafter == name:
            cells = [
                number(one["speedup"]) + (BEST if (one["batch_size"], name, rule, row["draft"]) in best else "")
                for one in row["predicted"]
            ]
            table.add_row(rule, row["draft"], *cells)
    return table


def outlook_table(batches: Sequence[Mapping[str, Any]]) -> Table:
    """By batch size and rule, the draft that would be fastest."""
    drafters = {cell["drafter"] for batch in batches for cell in batch["rules"].values()}
    table = table_of(["batch", "rule", "draft", "accepted_length", "tokens/s", "speedup"], left=0)
    for batch in batches:
        plain = number(batch["plain_tokens_per_s"], 1)
        table.add_row(str(batch["batch_size"]), "plain", "-", number(1.0), plain, f"{number(1.0)}x")
        for rule, cell in batch["rules"].items():
            table.add_row(
                "",
                rule,
                Text(f"{cell['drafter']} {cell['draft']}" if len(drafters) > 1 else cell["draft"]),
                with_interval(cell["accepted_length"], cell["accepted_length_interval"]),
                number(cell["tokens_per_s"], 1),
                with_interval(cell["speedup"], cell["speedup_interval"]).replace(" [", "x [", 1)
                + ("" if cell["speedup_interval"] else "x"),
            )
    return table


def _advice(results: dict[str, Any]) -> Iterator[str]:
    """What pays at which batch size."""
    yield f"{BEST} the largest speedup of its batch size."
    for one in results["best"]:
        if one["speedup"] > 1:
            how = f"tree {one['draft']}" if one["rule"] == TREES else f"chains of {one['draft']}, rule {one['rule']}"
            yield f"batch {one['batch_size']}: {one['drafter']}, {how}: {number(one['speedup'])}x"
        else:
            yield f"batch {one['batch_size']}: nothing pays ({number(one['speedup'])}x at best)"
