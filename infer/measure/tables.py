"""Results of bench, compare and replay as tables for a terminal. Every number shown is one of the JSON values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from draftsmith.infer.measure.terminal import empty_table, fit, wrap

# Differences and errors shown per drafter; the JSON has all of them.
SHOWN = 5
# Drafts with more nodes than this can be made smaller, which pays where passes are expensive.
FEW_NODES = 8
# In place of the number of equal answers.
DRAWN = "drawn"


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


def table_of(columns: Sequence[str], left: int = 1) -> Table:
    """An empty table; the first `left` columns are text, the others numbers. `show` fits it into the terminal."""
    return empty_table(columns, left)


def bench_tables(results: dict[str, Any], head: Sequence[str] = ()) -> list[RenderableType]:
    """The sentences of `head`, such as the verdict, the tables, and every runner's tokens/s on the last line."""
    drafters = results["drafters"]
    titled = {
        "Speed": speed_table(drafters),
        "Where the time goes": time_table(drafters),
        "Acceptance by depth": depth_table(drafters),
        "Exits used, by depth": exit_table(drafters),
        "Speedup (accepted_length) by task": category_table(drafters),
    }
    shown = [part for title, table in titled.items() if table.row_count for part in (Text(title), table, Text())]
    first = [*map(Text, head), Text()] if head else []
    return [*first, *shown, *map(Text, bench_notes(results)), Text(), Text(rates(results))]


def rates(results: dict[str, Any]) -> str:
    """Every runner's tokens/s in one line, with the speedup."""
    shown = []
    for name, row in results["drafters"].items():
        end_to_end = row["speedup_of"] != "decode"
        rate = number(row["end_to_end_tokens_per_s" if end_to_end else "tokens_per_s"])
        known = name != results["baseline"] and row["speedup"] is not None
        shown.append(f"{name} {rate}" + (f" ({number(row['speedup'])}x{', end to end' * end_to_end})" if known else ""))
    return "tokens/s: " + ", ".join(shown)


def speed_table(drafters: dict[str, Any]) -> Table:
    columns = ["drafter", "decode tokens/s", "end-to-end tokens/s", "speedup", "accepted_length", "break-even"]
    columns += ["acceptance_rate", "hit_rate", "nodes/step", "overhead", "equal", "errors"]
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
            equal_text(row),
            str(row["errors"]),
        )
    return table


def equal_text(row: dict[str, Any]) -> str:
    """How many answers are plain's, token by token; "drawn" where none needs to be."""
    if row.get("drawn"):
        return DRAWN
    text = of(row["equal"], row["total"]) + (f" + {row['ties']} ties" if row.get("ties") else "")
    return text + (f" + {row['not_judged']} not judged" if row.get("not_judged") else "")


def time_table(drafters: dict[str, Any]) -> Table:
    columns = ["drafter", "TTFT ms", "step p50 ms", "step p95 ms", "target", "draft", "overhead", "bandwidth used"]
    table = table_of(columns)
    for name, row in drafters.items():
        shares = row["time_shares"]
        times = [milliseconds(row[key]) for key in ("ttft_s", "p50_step_s", "p95_step_s")]
        parts = [percent(shares[key]) for key in ("target", "draft", "overhead")]
        table.add_row(Text(name), *times, *parts, percent(row.get("limit_share")))
    return table


def depth_table(drafters: dict[str, Any]) -> Table:
    """Acceptance by depth, one column per depth."""
    deepest = max((row["depth"] for drafter in drafters.values() for row in drafter["by_depth"]), default=0)
    table = table_of(["drafter", *(str(depth) for depth in range(1, deepest + 1))])
    for name, drafter in drafters.items():
        shares = {row["depth"]: row["share"] for row in drafter["by_depth"]}
        if shares:
            table.add_row(Text(name), *(percent(shares.get(depth)) for depth in range(1, deepest + 1)))
    return table


def exit_table(drafters: dict[str, Any]) -> Table:
    """Nodes drafted from each exit: one row per exit, one column per depth."""
    found = {name: drafter["exits_by_depth"] for name, drafter in drafters.items() if drafter.get("exits_by_depth")}
    depths = sorted({row["depth"] for rows in found.values() for row in rows})
    table = table_of(["drafter", "exit", *(str(depth) for depth in depths), "all"])
    for name, rows in found.items():
        counts = {row["depth"]: row["exits"] for row in rows}
        for exit in sorted({exit for row in rows for exit in row["exits"]}, key=int):
            nodes = [counts.get(depth, {}).get(exit, 0) for depth in depths]
            table.add_row(Text(name), f"{exit} layers", *map(str, nodes), str(sum(nodes)))
    return table


def category_table(drafters: dict[str, Any]) -> Table:
    """Speedup and accepted_length by task and overall."""
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
    """The bandwidth measured, questions left out, errors and differences."""
    notes = []
    if results.get("bandwidth"):
        notes.append(
            f"bandwidth used: weight bytes read per second over the memory's read bandwidth, "
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
    if results.get("not_judged"):
        notes.append(f"not judged: whether differences are numeric ties ({results['not_judged']})")
    for name, row in results["drafters"].items():
        notes += [f"{name}, question {one['question_id']}: {one['error']}" for one in row["error_list"][:SHOWN]]
        differences = [] if row.get("drawn") else row["differences"]
        for one in differences[:SHOWN]:
            notes.append(
                f"{name}, question {one['question_id']}, turn {one['turn'] + 1}: differs from {results['baseline']} "
                f"at token {one['index']} ({one['base']} there, {one['other']} here){_judged(one)}"
            )
        notes += _rest(name, len(row["error_list"]), len(differences))
    drawn = [name for name, row in results["drafters"].items() if row.get("drawn")]
    if drawn:
        notes.append(
            f"{DRAWN}: the answers of {', '.join(drawn)} have {results['baseline']}'s distribution, not its tokens, so "
            "they are not compared."
        )
    return notes


def _judged(difference: dict[str, Any]) -> str:
    """The judgement on a difference, if there is one."""
    if "tie" not in difference:
        return ""
    figures = (
        f"float32 logits {difference['gap']:.2g} apart, rounding error {difference['error']:.2g}, "
        f"the engine's error {difference['own_error']:.2g}, over the vocabulary {difference['drift']:.1f} x rounding"
    )
    return f": numeric tie ({figures})" if difference["tie"] else f": NOT A TIE, A BUG ({figures})"


def _rest(name: str, errors: int, differences: int) -> list[str]:
    counts = (("errors", errors), ("differences", differences))
    return [f"{name}: {SHOWN} of {count} {what} shown" for what, count in counts if count > SHOWN]


def compare_tables(report: dict[str, Any]) -> list[RenderableType]:
    tables: list[RenderableType] = [Text(f"warning: {line}") for line in report["warnings"]]
    tables += [Text(f"Compared with {report['base']}"), equality_table(report)]
    for name, other in report["others"].items():
        tables += [Text(), Text(name), task_table(other), Text(), spec_bench_table(other)]
        tables += [Text(line) for line in compare_notes(name, other)]
    return tables


def equality_table(report: dict[str, Any]) -> Table:
    table = table_of(["answers", "equal", "differences", "errors", "pairs"])
    for name, other in report["others"].items():
        counts = (str(len(other["differences"])), str(other["errors"]), str(other["pairs"]))
        table.add_row(Text(_end_of(name)), of(other["equal"], other["total"]), *counts)
    return table


def _end_of(path: str, limit: int = 40) -> str:
    return path if len(path) <= limit else f"…{path[1 - limit :]}"


def task_table(other: dict[str, Any]) -> Table:
    """Our speedup by task. Against another run, both sides are first divided by plain decoding of their own run."""
    own = other.get("speedup_of") == "own_plain"
    beside = ("over its plain", "over_own_plain") if own else ("base tokens/s", "base_tokens_per_s")
    table = table_of(["task", "pairs", "end-to-end tokens/s", beside[0], "speedup"])
    for task, row in [*other["by_category"].items(), ("overall", other)]:
        table.add_row(
            Text(task),
            str(row["pairs"]),
            number(row["tokens_per_s"]),
            number(row[beside[1]]) + ("x" if own and row[beside[1]] is not None else ""),
            Text(with_interval(row["speedup"], row["speedup_interval"])),
        )
    return table


def spec_bench_table(other: dict[str, Any]) -> Table:
    """Spec-Bench's two figures by task."""
    table = table_of(["task", "Spec-Bench's speedup", "accepted_length"])
    for task, row in [*other["by_category"].items(), ("overall", other)]:
        spec = with_interval(row["spec_bench"]["speedup"], row["spec_bench"]["speedup_interval"])
        table.add_row(Text(task), Text(spec), number(row["accepted_length"]))
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
    """A difference in words."""
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
            base, other = ("the end" if token is None else token for token in (base, other))
            return f"{turn}: token {difference['index']} is {base} in the base, {other} here"
        case "text":
            return f"{turn}: character {difference['index']}: {base!r} in the base, {other!r} here"
        case kind:
            return f": {base} {kind} in the base, {other} here"


def replay_tables(results: dict[str, Any]) -> list[RenderableType]:
    accepted = table_of(["drafter", "accepted_length", "acceptance_rate", "hit_rate", "steps"])
    cost = table_of(["drafter", "nodes/step", "propose p50 ms", "p99 ms"])
    for name, row in results["drafters"].items():
        length = with_interval(row["accepted_length"], row["accepted_length_interval"])
        shares = (percent(row["acceptance_rate"]), percent(row["hit_rate"]))
        accepted.add_row(Text(name), length, *shares, str(row["steps"]))
        times = [number(row[key] * 1e3, 3) for key in ("propose_p50_s", "propose_p99_s")]
        cost.add_row(Text(name), number(row["nodes_per_step"], 1), *times)
    shown: list[RenderableType] = [accepted, Text(), cost, Text(), *map(Text, replay_notes(results))]
    if any(row["predicted"] for row in results["drafters"].values()):
        mark = f" ({results['modelled']})" if results["modelled"] else ""
        shown += [Text(), Text(f"costs: {results['costs']}")]
        for title, key in (("Predicted speedup", "speedup"), ("Break-even", "break_even")):
            shown += [Text(), Text(f"{title}{mark}, by batch size"), predicted_table(results, key)]
        shown += [Text(), *map(Text, predicted_notes(results))]
    return [*shown, Text(), Text(results["conclusion"]["sentence"])]


def replay_notes(results: dict[str, Any]) -> Iterator[str]:
    """What was replayed, indexed and leaked."""
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
        yield "Each answer was added, once replayed, to the drafters that can take it in."
    yield from leakage_warnings(results)


def leakage_warnings(results: dict[str, Any]) -> Iterator[str]:
    """One line for each drafter whose store holds some of the answers or prompts verbatim."""
    for name, row in results["drafters"].items():
        leaked = row["leakage"]
        if not leaked or not leaked["left_out"]:
            continue
        without = leaked["without"]
        rest = "nothing else is left"
        if without:
            figure = with_interval(without["accepted_length"], without["accepted_length_interval"])
            rest = f"accepted_length without them {figure}"
        yield (
            f"warning: {name} already holds {leaked['answers']} of {results['streams']} answers verbatim "
            f"({percent(leaked['token_share'])} of their tokens) and {leaked['prompts']} prompts "
            f"({percent(leaked['prompt_token_share'])}): {rest}"
        )


def predicted_table(results: dict[str, Any], key: str) -> RenderableType:
    """Speedup or break-even, one column per batch size, and up to which the drafter pays."""
    sizes = [row["batch_size"] for row in next(iter(results["drafters"].values()))["predicted"]["by_batch_size"]]
    table = table_of(["drafter", *map(str, sizes), ""])
    for name, row in results["drafters"].items():
        found = row["predicted"]
        cells = [number(one[key]) for one in found["by_batch_size"]]
        table.add_row(Text(name), *cells, Text(pays(found["off_above"], max(sizes))))
    return table


def pays(off_above: int | None, most: int) -> str:
    if off_above is None:
        return f"pays up to {most}"
    return f"off above {off_above}" if off_above else "off: pays at no batch size"


def predicted_notes(results: dict[str, Any]) -> Iterator[str]:
    """What break-even means, what to try if a drafter never pays, and which predictions are extrapolated."""
    known = "modelled" if results["modelled"] else "measured"
    yield "Break-even is the accepted_length that a drafter needs to be as fast as plain decoding."
    for name, row in results["drafters"].items():
        found = row["predicted"]
        if found["off_above"] == 0 and row["nodes_per_step"] > FEW_NODES:
            yield (
                f"{name}: {number(row['nodes_per_step'], 0)} nodes a step do not pay here; fewer cost less and may: "
                f"append [nodes={FEW_NODES}] to its name."
            )
        beyond = [one["batch_size"] for one in found["by_batch_size"] if one["batch_size"] > found["measured_up_to"]]
        if beyond:
            yield f"{name}: from batch {min(beyond)} on, passes are larger than any {known}."


def show(renderables: Sequence[RenderableType], console: Console | None = None) -> None:
    """Print tables and sentences at the console's width: 80 columns if there is no terminal and COLUMNS is not set."""
    console = console or Console()
    for renderable in renderables:
        parts: Sequence[RenderableType] = [renderable]
        if isinstance(renderable, Table):
            parts = fit(renderable, console.width)
        elif isinstance(renderable, Text):
            parts = [Text(wrap(renderable.plain, console.width))]
        for number, part in enumerate(parts):
            if number:
                console.print()
            console.print(part, soft_wrap=isinstance(part, Text), markup=False, highlight=False)
