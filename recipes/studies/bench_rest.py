"""`draftsmith store bench rest`: the rest drafter on recorded answers, beside REST's own rule where that is installed.

Options and the table; what is measured is retrieval's (rest_bench.py).
"""

from __future__ import annotations

import json as json_module
import sys
import tempfile
from pathlib import Path
from typing import Any

NODES = 64


def bench_rest(
    *,
    store: str,
    data: list[str],
    tokenizer: str,
    nodes: int = NODES,
    limit: int | None = None,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Replay recorded answers with the rest drafter, with prompt lookup, and with draftretriever if it is installed.

    Example: draftsmith store bench rest --store STORE --data answers.jsonl --tokenizer MODEL

    Args:
        store: the store, of other text than the answers replayed.
        data: recorded answers with their prompts.
        tokenizer: folder or Hub name of the tokenizer that the store was built with.
        nodes: the most nodes of a draft.
        limit: replay so many records at most.
        seed: of the intervals.
        json: print one JSON object on the last line.
    """
    from draftsmith.infer.measure.recordings import recordings
    from draftsmith.infer.text.records import read_records
    from draftsmith.infer.text.templates import load_tokenizer
    from draftsmith.recipes.studies.rest_bench import PEER, compare, has_peer
    from draftsmith.retrieval.store.documents import choose_template
    from draftsmith.retrieval.store.segments import Store

    opened = Store.open(store, "rest", "checksums")
    known = load_tokenizer(tokenizer)
    template = choose_template(opened.manifest.template_name, known)
    streams = recordings(read_records(data, limit=limit, need="answers"), template)
    if not has_peer():
        print(f"{PEER} is not installed (pip install {PEER}): REST's own rule is not shown", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        results = compare(opened, streams, known, nodes, seed, Path(folder))
    _show(results)
    if json:
        print(json_module.dumps({"drafters": results, "streams": len(streams), "tokens": opened.manifest.tokens}))


def _show(results: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    names = list(dict.fromkeys(name for figures in results.values() for name in figures))
    table = Table("", *results)
    for name in names:
        table.add_row(name.replace("_", " "), *(_cell(figures.get(name)) for figures in results.values()))
    Console(width=120).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{value[0]:.3f} .. {value[1]:.3f}"
    return "" if value is None else f"{value:.3f}"
