"""The results of a load as tables and sentences. Every number shown is one of the JSON values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from draftsmith.infer.measure.bootstrap import MIN_PAIRS
from draftsmith.infer.measure.served.counters import SGLANG
from draftsmith.infer.measure.tables import SHOWN, milliseconds, number, of, percent, table_of, with_interval

KINDS = {"draftsmith": "Draftsmith", "vllm": "vLLM", "sglang": "SGLang", "": "unknown server"}


def served_tables(results: dict[str, Any], config: dict[str, Any]) -> list[RenderableType]:
    """The sentences, the tables, and what to know when reading them."""
    shown: list[RenderableType] = [Text(sentence(results)), Text()]
    for title, (heads, rows) in tables(results, config).items():
        table = table_of(heads, left=2)
        for row in rows:
            table.add_row(*map(Text, row))
        shown += [Text(title), table, Text()]
    return [*shown, *map(Text, notes(results, config))]


def tables(results: dict[str, Any], config: dict[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Title -> heads and rows; the first two columns are the number of requests and the server."""
    named = [
        (str(level["concurrency"]), name, row) for level in results["levels"] for name, row in level["servers"].items()
    ]
    speed = ["tokens/s"] + (["speedup"] if results["baseline"] else []) + ["requests", "errors", "in flight"]
    waits = ["TTFT p50 ms", "TTFT p95 ms", "TPOT p50 ms", "TPOT p95 ms", "answer p50 s", "answer p95 s"]
    made = {
        "Speed by number of concurrent requests": (
            ["at once", "server", *speed],
            [[many, name, *_speed(row, results["baseline"])] for many, name, row in named],
        ),
        "Waiting": (["at once", "server", *waits], [[many, name, *_waits(row)] for many, name, row in named]),
    }
    drafts = [
        [
            many,
            f"{name}: {drafter}",
            number(one["accepted_length"]),
            percent(one["acceptance_rate"]),
            "-" if one["steps"] is None else str(one["steps"]),
        ]
        for many, name, row in named
        for drafter, one in row["drafters"].items()
    ]
    if drafts:
        heads = ["at once", "drafter", "accepted_length", "acceptance_rate", "steps"]
        made["Drafts, as the server counts them"] = heads, drafts
    return made


def _speed(row: dict[str, Any], baseline: str | None) -> list[str]:
    beside = [with_interval(row["speedup"], row["speedup_interval"])] if baseline else []
    rate = with_interval(row["tokens_per_s"], row["tokens_per_s_interval"])
    return [rate, *beside, str(row["requests"]), str(row["errors"]), number(row["in_flight"], 1)]


def _waits(row: dict[str, Any]) -> list[str]:
    first = [milliseconds(row[f"{name}_{share}_s"]) for name in ("ttft", "tpot") for share in ("p50", "p95")]
    return [*first, number(row["answer_p50_s"]), number(row["answer_p95_s"])]


def sentence(results: dict[str, Any]) -> str:
    """What the load showed, in one sentence."""
    (name, facts), *_ = results["servers"].items()
    what = f"{facts['model']} ({KINDS[facts['kind']]})"
    if results["baseline"]:
        return f"{what}: {_drafts_pay(results, name)}."
    rates, first = [], ""
    for level in results["levels"]:
        row, many = level["servers"][name], level["concurrency"]
        rates.append(f"{number(row['tokens_per_s'], 1)} with {many}")
        first = f"there the first text comes after {milliseconds(row['ttft_p50_s'])} ms (p95 " + (
            f"{milliseconds(row['ttft_p95_s'])} ms)"
        )
    return f"{what}: tokens/s {', '.join(rates)} requests at a time; {first}."


def _drafts_pay(results: dict[str, Any], name: str) -> str:
    """At which numbers of requests the server with drafts is faster than the one without."""
    found: dict[str, list[str]] = {"faster": [], "slower": [], "even": [], "unknown": []}
    for level in results["levels"]:
        row = level["servers"][name]
        ends = row["speedup_interval"]
        if row["speedup"] is None or ends is None:
            kind = "unknown"
        else:
            kind = "faster" if ends[0] > 1 else "slower" if ends[1] < 1 else "even"
        shown = with_interval(row["speedup"], ends)
        speedup = shown.replace(" [", "x [", 1) if ends else shown if row["speedup"] is None else f"{shown}x"
        many = level["concurrency"]
        found[kind].append(f"{many} {'request' if many == 1 else 'requests'} ({speedup})")
    few = f"fewer than {MIN_PAIRS} questions give no interval"
    words = {
        "faster": "drafts pay with {} at a time",
        "even": "nothing is certain with {} at a time",
        "slower": "drafts cost time with {} at a time",
        "unknown": f"it is not known with {{}} at a time, since {few}",
    }
    return "; ".join(words[kind].format(", ".join(several)) for kind, several in found.items() if several)


def notes(results: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """What the figures mean, errors, and what may have disturbed them."""
    made = [
        "TTFT: the wait for an answer's first text. TPOT: seconds per token after it. Tokens are those that the server "
        "counts."
    ]
    if results["questions"] < MIN_PAIRS:
        made.append(f"fewer than {MIN_PAIRS} questions give no interval")
    for name, facts in results["servers"].items():
        rows = [level["servers"][name] for level in results["levels"]]
        if facts["metrics_problem"]:
            made.append(f"{name}: acceptance is not known: {facts['metrics_problem']}")
        elif not any(row["drafters"] for row in rows):
            made.append(f"{name}: its /metrics show no drafts")
        elif facts["kind"] == SGLANG:
            made.append(f"{name}: SGLang shows the acceptance of its latest steps, not of the whole load")
        if any(row["others_tokens"] for row in rows):
            made.append(f"{name}: somebody else used the server as well, so that these figures do not count")
        made += _cached(name, rows)
        errors = [one | {"at": level["concurrency"]} for level, row in zip(results["levels"], rows) for one in
                  row["error_list"]]  # fmt: skip
        made += [f"{name}, {one['at']} at a time, question {one['question_id']}: {one['error']}" for one in
                 errors[:SHOWN]]  # fmt: skip
        made += [f"{name}: {SHOWN} of {len(errors)} errors shown"] if len(errors) > SHOWN else []
        if results["baseline"] not in (None, name) and not config.get("temperature"):
            counts = ", ".join(of(row["equal"], row["total"]) for row in rows)
            made.append(f"{name}: answers with the very text of {results['baseline']}: {counts}")
    return made


def _cached(name: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """A warning where prompts were not read but found, which makes TTFT that of repeated prompts."""
    shares = [row["cached_share"] or 0.0 for row in rows]
    if max(shares, default=0.0) < 0.5:
        return []
    shown = ", ".join(percent(share) for share in shares)
    return [
        f"{name}: of the prompts' tokens, {shown} were in its cache, since every load asks the same questions: TTFT is "
        "that of repeated prompts. To measure new ones, start the server without a prefix cache."
    ]
