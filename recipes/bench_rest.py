"""`draftsmith store bench rest`: the rest drafter on recorded answers, beside REST's own rule where that is installed.

Both draft from the same documents for the same streams, in one process, through the one decode loop.
"""

from __future__ import annotations

import importlib.util
import json as json_module
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from draftsmith.infer.contract import Drafter
    from draftsmith.infer.trace import Generation
    from draftsmith.retrieval.store import Store

NODES = 64
PEER = "draftretriever"


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

    Args:
        store: the store, of other text than the answers replayed.
        data: recorded answers with their prompts.
        tokenizer: folder or Hub name of the tokenizer that the store was built with.
        nodes: the most nodes of a draft.
        limit: replay so many records at most.
        seed: of the intervals.
        json: print one JSON object on the last line.
    """
    from draftsmith.infer.templates import find_template, load_tokenizer
    from draftsmith.retrieval import PromptLookup, Rest
    from draftsmith.retrieval.documents import choose_template
    from draftsmith.retrieval.rest_build import make_parts
    from draftsmith.retrieval.store import Store

    opened = Store.open(store, "rest")
    known = load_tokenizer(tokenizer)
    name = opened.manifest.template_name
    template = choose_template(name, known) if name == "auto" else find_template(name, known)
    streams = _streams(data, template, limit)
    drafters: dict[str, Any] = {"rest": Rest(store, nodes=nodes), "pld": PromptLookup(nodes=nodes)}
    with tempfile.TemporaryDirectory() as folder:
        built = {"rest": _rebuild(opened, Path(folder) / "store", make_parts), "pld": 0.0}
        if importlib.util.find_spec(PEER) is None:
            print(f"{PEER} is not installed (pip install {PEER}): REST's own rule is not shown", file=sys.stderr)
        else:
            built[PEER], drafters[PEER] = _peer(opened, Path(folder) / "index", nodes)
        vocab_size = max(opened.manifest.vocab_size, len(known))
        runs = {label: _replay(drafter, streams, vocab_size, known, nodes) for label, drafter in drafters.items()}
    results = _figures(runs, seed)
    for label, figures in results.items():
        figures["build_s_per_million"] = built[label] / opened.manifest.tokens * 1e6
    if PEER in drafters:
        results[PEER] |= _latency("search", drafters[PEER].seconds)
    _show(results)
    if json:
        print(json_module.dumps({"drafters": results, "streams": len(streams), "tokens": opened.manifest.tokens}))


def _streams(data: list[str], template: Any, limit: int | None) -> dict[str, tuple[list[int], list[int]]]:
    """Prompt and answer ids of every record, by a key of its own."""
    from draftsmith.infer.records import read_records
    from draftsmith.infer.templates import render_record

    streams = {}
    for number, record in enumerate(read_records(data, limit=limit, need="answers")):
        sample = render_record(template, record)[0]
        start = sample.loss_mask.index(1)
        end = sample.loss_mask.index(0, start) if 0 in sample.loss_mask[start:] else len(sample.loss_mask)
        streams[f"{number}:{record.id}"] = (sample.token_ids[:start], sample.token_ids[start:end])
    return streams


def _rebuild(opened: Store, folder: Path, make_parts: Any) -> float:
    """Seconds from tokens to a written segment, the documents in memory before."""
    from dataclasses import replace

    from draftsmith.retrieval.documents import Document
    from draftsmith.retrieval.store_writer import build

    batches = [[Document(told["id"], ids)] for told, ids in opened.documents()]
    manifest = replace(opened.manifest, segments=[], next_segment=1)
    began = time.perf_counter()
    build(folder, manifest, lambda skip: iter(batches[skip:]), make_parts, job={})
    return time.perf_counter() - began


def _peer(opened: Store, index: Path, nodes: int) -> tuple[float, Any]:
    from draftsmith.retrieval.rest_peer import DraftRetriever

    documents = [ids.tolist() for _, ids in opened.documents()]
    began = time.perf_counter()
    drafter = DraftRetriever.build(index, documents, opened.manifest.vocab_size, nodes)
    return time.perf_counter() - began, drafter


def _replay(
    drafter: Drafter, streams: dict[str, tuple[list[int], list[int]]], vocab: int, known: Any, nodes: int
) -> list[Generation]:
    from draftsmith.infer.contract import Budget
    from draftsmith.infer.generate import generate
    from draftsmith.infer.recorded_target import RecordedTarget
    from draftsmith.infer.row import Row, Stops

    target = RecordedTarget({key: answer for key, (_, answer) in streams.items()}, vocab, known)
    rows = [Row(key, list(prompt), stops=Stops(len(answer))) for key, (prompt, answer) in streams.items()]
    drafter.bind(target)
    return generate(target, drafter, rows, budget=Budget(nodes, NODES))


def _figures(runs: dict[str, list[Generation]], seed: int) -> dict[str, dict[str, Any]]:
    """Per drafter: what its traces tell, and its accepted_length over REST's where that was measured."""
    from draftsmith.infer.measure.bootstrap import ratio_interval, speedup_interval
    from draftsmith.infer.measure.metrics import Totals

    columns: dict[str, tuple[list[int], list[int]]] = {}
    results: dict[str, dict[str, Any]] = {}
    for label, run in runs.items():
        rows = [Totals.of(done.traces) for done in run]
        whole = sum(rows, Totals())
        committed, steps = columns[label] = [row.committed for row in rows], [row.steps for row in rows]
        results[label] = {
            "accepted_length": whole.accepted_length,
            "accepted_length_interval": ratio_interval(committed, steps, seed=seed),
            "hit_rate": whole.hit_rate,
            "nodes_per_step": whole.nodes_per_step,
            "acceptance_rate": whole.acceptance_rate,
            **_latency("propose", [trace.propose_s for done in run for trace in done.traces]),
        }
    for label, figures in results.items() if PEER in runs else ():
        figures["over_rest_rule"] = figures["accepted_length"] / results[PEER]["accepted_length"]
        figures["over_rest_rule_interval"] = speedup_interval(*columns[label], *columns[PEER], seed=seed)
    return results


def _latency(what: str, seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {f"{what}_p{rank}_ms": ordered[int(len(ordered) * rank / 100)] * 1e3 for rank in (50, 99)}


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
