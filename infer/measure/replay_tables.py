"""A replay's results as tables for a terminal. Every number shown is one of the JSON values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from draftsmith.infer.measure.tables import number, percent, table_of, with_interval

COLUMNS = ["drafter", "accepted_length", "acceptance", "hit rate", "nodes/step", "propose p50 ms", "p99 ms", "steps"]


def replay_tables(results: dict[str, Any]) -> list[RenderableType]:
    table = table_of(COLUMNS)
    for name, row in results["drafters"].items():
        table.add_row(
            Text(name),
            with_interval(row["accepted_length"], row["accepted_length_interval"]),
            percent(row["acceptance_rate"]),
            percent(row["hit_rate"]),
            number(row["nodes_per_step"], 1),
            number(row["propose_p50_s"] * 1e3, 3),
            number(row["propose_p99_s"] * 1e3, 3),
            str(row["steps"]),
        )
    shown: list[RenderableType] = [table, Text(), *map(Text, notes(results))]
    if any(row["predicted"] for row in results["drafters"].values()):
        shown += [Text(), predicted_table(results), *map(Text, predicted_notes(results))]
    return shown


def notes(results: dict[str, Any]) -> Iterator[str]:
    """What was replayed, out of what, and what of it the drafters held already."""
    greedy = "taken as greedy: exact for every drafter"
    how = "sampled: exact for outright drafts" if results["temperature"] > 0 else greedy
    yield f"{results['streams']} recorded answers, {results['tokens']} tokens; {how}."
    if split := results.get("split"):
        since = f", from {split['replayed_from']}" if split["by"] == "time" else ""
        yield (
            f"{split['indexed_answers']} earlier answers ({split['indexed_tokens']} tokens) were indexed, "
            f"{split['replayed_answers']} later ones replayed{since}."
        )
    if results["arrival"]:
        yield "Every answer was taken in once it had been replayed, by the drafters that can."
    yield from warnings(results)


def warnings(results: dict[str, Any]) -> Iterator[str]:
    """One line for each drafter that held some of the answers word for word."""
    for name, row in results["drafters"].items():
        leaked = row["leakage"]
        if not leaked or not leaked["answers"]:
            continue
        without = leaked["without"]
        rest = "none are left without them"
        if without:
            figure = with_interval(without["accepted_length"], without["accepted_length_interval"])
            rest = f"accepted_length without them {figure}"
        yield (
            f"warning: {name} drafts from {leaked['answers']} of {results['streams']} answers word for word "
            f"({percent(leaked['share'])}, {percent(leaked['token_share'])} of the tokens): {rest}"
        )


def predicted_table(results: dict[str, Any]) -> RenderableType:
    """Speedup and break-even by batch size."""
    sizes = [row["batch_size"] for row in next(iter(results["drafters"].values()))["predicted"]["by_batch_size"]]
    table = table_of(["predicted speedup (break-even)", *(f"batch {size}" for size in sizes), ""])
    for name, row in results["drafters"].items():
        found = row["predicted"]
        cells = [f"{number(one['speedup'])} ({number(one['break_even'])})" for one in found["by_batch_size"]]
        table.add_row(Text(name), *cells, Text(pays(found["off_above"], max(sizes))))
    return table


def pays(off_above: int | None, most: int) -> str:
    if off_above is None:
        return f"pays up to {most}"
    return f"off above {off_above}" if off_above else "off: pays at no batch size"


# A draft of more nodes than these has room to be made smaller, which is what pays where passes are dear.
FEW_NODES = 8


def predicted_notes(results: dict[str, Any]) -> Iterator[str]:
    """What the predictions rest on, which of them go beyond what was measured, and what to try where nothing pays."""
    yield "Break-even is the accepted_length that a drafter needs to be as fast as plain decoding."
    for name, row in results["drafters"].items():
        found = row["predicted"]
        if found["off_above"] == 0 and row["nodes_per_step"] > FEW_NODES:
            yield (
                f"{name}: {number(row['nodes_per_step'], 0)} nodes a step do not pay here; fewer cost less, and may: "
                f"[nodes={FEW_NODES}] behind its name."
            )
        beyond = [one["batch_size"] for one in found["by_batch_size"] if one["batch_size"] > found["measured_up_to"]]
        if beyond:
            yield f"{name}: from batch {min(beyond)} on, passes are larger than any that was measured."
