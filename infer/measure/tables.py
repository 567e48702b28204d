"""Results as tables for a terminal. Every number shown is one of the JSON values; nothing is computed here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

# So many differences and errors are shown; the JSON has all of them.
SHOWN = 5
# A narrow terminal may break a table's lines, but no digit is cut off.
WIDTH = 240


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f}"


def with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    return number(value) if interval is None else f"{number(value)} [{number(interval[0])}, {number(interval[1])}]"


def of(part: int, whole: int) -> str:
    return f"{part}/{whole}"


def table_of(columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def bench_tables(results: dict[str, Any]) -> list[RenderableType]:
    drafters = results["drafters"]
    titled = {
        "Speed": speedtable_of(drafters),
        "Where the time goes": timetable_of(drafters),
        "Acceptance by depth": depthtable_of(drafters),
        "Exits used, by depth": exittable_of(drafters),
        "Speedup (accepted_length) by task": categorytable_of(drafters),
    }
    shown = [part for title, table in titled.items() if table.row_count for part in (Text(title), table, Text())]
    return [*shown, *(Text(line) for line in bench_notes(results))]


def speedtable_of(drafters: dict[str, Any]) -> Table:
    columns = ["drafter", "tokens/s", "end to end", "speedup", "accepted_length", "break-even"]
    columns += ["acceptance", "hit rate", "nodes/step", "overhead", "equal", "errors"]
    table = table_of(columns)
    for name, row in drafters.items():
        mark = "" if row["speedup_of"] == "decode" else " (end to end)"
        table.add_row(
            Text(name),
            number(row["tokens_per_s"]),
            number(row["end_to_end_tokens_per_s"]),
            Text(with_interval(row["speedup"], row["speedup_interval"]) + mark),
            number(row["accepted_length"]),
            number(row["break_even"]),
            percent(row["acceptance_rate"]),
            percent(row["hit_rate"]),
            number(row["nodes_per_step"], 1),
            percent(row["overhead"]),
            of(row["equal"], row["total"]) + (f" + {row['ties']} ties" if row.get("ties") else ""),
            str(row["errors"]),
        )
    return table


def timetable_of(drafters: dict[str, Any]) -> Table:
    columns = ["drafter", "TTFT ms", "step p50 ms", "step p95 ms", "target", "draft", "overhead", "of the limit"]
    table = table_of(columns)
    for name, row in drafters.items():
        shares = row["time_shares"]
        times = [milliseconds(row[key]) for key in ("ttft_s", "p50_step_s", "p95_step_s")]
        parts = [percent(shares[key]) for key in ("target", "draft", "overhead")]
        table.add_row(Text(name), *times, *parts, percent(row.get("limit_share")))
    return table


def depthtable_of(drafters: dict[str, Any]) -> Table:
    """Acceptance by depth, one column a depth."""
    deepest = max((row["depth"] for drafter in drafters.values() for row in drafter["by_depth"]), default=0)
    table = table_of(["drafter", *(str(depth) for depth in range(1, deepest + 1))])
    for name, drafter in drafters.items():
        shares = {row["depth"]: row["share"] for row in drafter["by_depth"]}
        if shares:
            table.add_row(Text(name), *(percent(shares.get(depth)) for depth in range(1, deepest + 1)))
    return table


def exittable_of(drafters: dict[str, Any]) -> Table:
    """Where drafts were left: nodes expanded from each exit, a row an exit, a column a depth."""
    found = {name: drafter["exits_by_depth"] for name, drafter in drafters.items() if drafter.get("exits_by_depth")}
    depths = sorted({row["depth"] for rows in found.values() for row in rows})
    table = table_of(["drafter", "exit", *(str(depth) for depth in depths), "all"])
    for name, rows in found.items():
        counts = {row["depth"]: row["exits"] for row in rows}
        for exit in sorted({exit for row in rows for exit in row["exits"]}, key=int):
            nodes = [counts.get(depth, {}).get(exit, 0) for depth in depths]
            table.add_row(Text(name), f"{exit} layers", *map(str, nodes), str(sum(nodes)))
    return table


def categorytable_of(drafters: dict[str, Any]) -> Table:
    """Speedup and accepted_length by task, and over all."""
    tasks = list(dict.fromkeys(task for drafter in drafters.values() for task in drafter["by_category"]))
    table = table_of(["drafter", *tasks, "overall"])
    for name, drafter in drafters.items():
        rows = [drafter["by_category"].get(task, {}) for task in tasks]
        table.add_row(
            Text(name),
            *(f"{number(row.get('speedup'))} ({number(row.get('accepted_length'))})" for row in [*rows, drafter]),
        )
    return table


def bench_notes(results: dict[str, Any]) -> list[str]:
    """What a reader of the tables has to know as well."""
    notes = []
    if results.get("bandwidth"):
        notes.append(
            f"of the limit: weight bytes read per second over the memory's read bandwidth, "
            f"{results['bandwidth'] / 1e9:.1f} GB/s here"
        )
    left_out = results["left_out"]
    if left_out["questions"]:
        notes.append(
            f"{left_out['questions']} of {results['questions']} questions ({percent(left_out['share'])}) are left out "
            f"of the figures: plain's answer loops (fewer than {percent(left_out['min_distinct'])} distinct 4-grams)."
        )
        notes += [
            f"  over all questions, {name}: speedup "
            + with_interval(row["all_questions"]["speedup"], row["all_questions"]["speedup_interval"])
            for name, row in results["drafters"].items()
        ]
    for name, row in results["drafters"].items():
        notes += [f"{name}, question {one['question_id']}: {one['error']}" for one in row["error_list"][:SHOWN]]
        for one in row["differences"][:SHOWN]:
            notes.append(
                f"{name}, question {one['question_id']}, turn {one['turn'] + 1}: differs from {results['baseline']} "
                f"at token {one['index']} ({one['base']} there, {one['other']} here){_judged(one)}"
            )
        notes += _rest(name, len(row["error_list"]), len(row["differences"]))
    return notes


def _judged(difference: dict[str, Any]) -> str:
    """What the float32 copy says of a difference, where it was asked."""
    if "tie" not in difference:
        return ""
    figures = f"float32 logits {difference['gap']:.2g} apart, rounding error there {difference['error']:.2g}"
    return f": numeric tie ({figures})" if difference["tie"] else f": NOT A TIE, A BUG ({figures})"


def _rest(name: str, errors: int, differences: int) -> list[str]:
    counts = (("errors", errors), ("differences", differences))
    return [f"{name}: {SHOWN} of {count} {what} shown" for what, count in counts if count > SHOWN]


def compare_tables(report: dict[str, Any]) -> list[RenderableType]:
    tables: list[RenderableType] = [Text(f"Compared with {report['base']}"), equalitytable_of(report)]
    for name, other in report["others"].items():
        tables += [Text(), Text(name), tasktable_of(other)]
        tables += [Text(line) for line in compare_notes(name, other)]
    return tables


def equalitytable_of(report: dict[str, Any]) -> Table:
    table = table_of(["answers", "equal", "differences", "errors", "pairs"])
    for name, other in report["others"].items():
        counts = (str(len(other["differences"])), str(other["errors"]), str(other["pairs"]))
        table.add_row(Text(name), of(other["equal"], other["total"]), *counts)
    return table


def tasktable_of(other: dict[str, Any]) -> Table:
    """Speed by task: ours with its interval, and Spec-Bench's."""
    columns = ["task", "pairs", "tokens/s", "base tokens/s", "speedup", "Spec-Bench's speedup", "accepted_length"]
    table = table_of(columns)
    for task, row in [*other["by_category"].items(), ("overall", other)]:
        table.add_row(
            Text(task),
            str(row["pairs"]),
            number(row["tokens_per_s"]),
            number(row["base_tokens_per_s"]),
            Text(with_interval(row["speedup"], row["speedup_interval"])),
            Text(with_interval(row["spec_bench"]["speedup"], row["spec_bench"]["speedup_interval"])),
            number(row["accepted_length"]),
        )
    return table


def compare_notes(name: str, other: dict[str, Any]) -> list[str]:
    notes = []
    if other.get("by_exit"):
        notes.append(
            "exits used: " + ", ".join(f"{nodes} nodes after {n} layers" for n, nodes in other["by_exit"].items())
        )
    for one in other["error_list"][:SHOWN]:
        sides = "; ".join(f"{side}: {one[side]}" for side in ("base", "other") if side in one)
        notes.append(f"{name}, question {one['question_id']} failed in {sides}")
    notes += [f"{name}, question {one['question_id']}{_where(one)}" for one in other["differences"][:SHOWN]]
    return notes + _rest(name, len(other["error_list"]), len(other["differences"]))


def _where(difference: dict[str, Any]) -> str:
    """One difference in words."""
    base, other = difference.get("base"), difference.get("other")
    turn = f", turn {difference['turn'] + 1}" if "turn" in difference else ""
    match difference["by"]:
        case "missing":
            return " is missing"
        case "extra":
            return " is not in the base"
        case "duplicated":
            return f" occurs {base} times in the base, {other} times here"
        case "token_ids":
            return f"{turn}: token {difference['index']} is {base} in the base, {other} here"
        case "text":
            return f"{turn}: character {difference['index']}: {base!r} in the base, {other!r} here"
        case kind:
            return f": {base} {kind} in the base, {other} here"


def show(renderables: Sequence[RenderableType], console: Console | None = None) -> None:
    if console is None:
        console = Console()
        console.width = max(console.width, WIDTH)
    for renderable in renderables:
        console.print(renderable, soft_wrap=isinstance(renderable, Text), markup=False, highlight=False)
