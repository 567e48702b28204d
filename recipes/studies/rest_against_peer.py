"""The rest drafter beside REST's own rule: the same documents and recorded answers, one process, one decode loop.

    python -m draftsmith.recipes.studies.rest_against_peer --store STORE --data answers.jsonl --tokenizer MODEL

REST's rule runs in its own package, draftretriever (PyPI, a Rust extension), if that is installed: the newest 16, 15,
..., 2 tokens are looked up, and the longest span that is found gives the draft. Its index has 16-bit ids and no
document boundaries. The ratio of accepted_lengths has an interval paired by answer.
"""

from __future__ import annotations

import importlib.util
import json as json_module
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.protocols import Budget, Drafter, Feedback, PassTimer, Target, Verdict
from draftsmith.infer.contract.row import Row
from draftsmith.infer.measure.bootstrap import speedup_interval
from draftsmith.infer.measure.metrics import per_answer
from draftsmith.infer.measure.recordings import Recording, recordings
from draftsmith.infer.measure.replay import Replay
from draftsmith.infer.text.records import read_records
from draftsmith.infer.text.templates import find_template, load_tokenizer
from draftsmith.recipes.studies import run_study
from draftsmith.recipes.studies.rest_scale import latency
from draftsmith.retrieval.pld import PromptLookup
from draftsmith.retrieval.rest.build import make_parts
from draftsmith.retrieval.rest.drafter import Rest
from draftsmith.retrieval.store.documents import Document
from draftsmith.retrieval.store.segments import Store
from draftsmith.retrieval.store.writer import build

PEER = "draftretriever"


def rest_against_peer(
    *,
    store: str,
    data: list[str],
    tokenizer: str,
    nodes: int = 64,
    limit: int | None = None,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Replay recorded answers with the rest drafter, with prompt lookup, and with draftretriever if it is installed.

    Args:
        store: a rest store, of other text than the answers.
        data: recorded answers with their prompts.
        tokenizer: folder or Hub name of the tokenizer that the store was built with.
        nodes: the most nodes of a draft.
        limit: the most records to replay.
        seed: of the intervals.
        json: print one JSON object on the last line.
    """
    opened = Store.open(store, "rest", "checksums")
    loaded = load_tokenizer(tokenizer)
    template = find_template(opened.manifest.template_name, loaded)
    streams = recordings(read_records(data, limit=limit, need="answers"), template)
    if not _has_peer():
        print(f"{PEER} is not installed (pip install {PEER}): REST's own rule is not shown", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        results = compare(opened, streams, loaded, nodes, seed, Path(folder))
    _show(results)
    if json:
        print(json_module.dumps({"drafters": results, "streams": len(streams), "tokens": opened.manifest.tokens}))


def compare(
    opened: Store, streams: Sequence[Recording], tokenizer: Any, nodes: int, seed: int, folder: Path
) -> dict[str, dict[str, Any]]:
    """Per drafter: the figures of its replay, the seconds to build its index, and its ratio to REST's rule."""
    drafters: dict[str, Drafter] = {
        "rest": Rest(str(opened.path), nodes=nodes, verify=False), "pld": PromptLookup(nodes=nodes)
    }  # fmt: skip
    seconds = {"rest": rebuild(opened, folder / "store"), "pld": 0.0}
    searches: list[float] = []
    if _has_peer():
        documents = [ids.tolist() for _, ids in opened.documents()]
        began = time.perf_counter()
        peer = DraftRetriever.build(folder / "index", documents, opened.manifest.vocab_size, nodes)
        seconds[PEER], searches = time.perf_counter() - began, peer.seconds
        drafters[PEER] = peer
    vocab_size = max(opened.manifest.vocab_size, len(tokenizer))
    replay = Replay(streams, vocab_size, tokenizer, budget=Budget(nodes, nodes), seed=seed)
    replayed = replay.run(drafters)
    results = {name: _in_ms(replay.figures(found)) for name, found in replayed.items()}
    for name, figures in results.items():
        figures["build_s_per_million"] = seconds[name] / opened.manifest.tokens * 1e6
    if PEER in drafters:
        results[PEER] |= latency("search", searches)
        base = per_answer(replayed[PEER].done)
        for name, figures in results.items():
            figures["over_rest_rule"] = figures["accepted_length"] / results[PEER]["accepted_length"]
            columns = per_answer(replayed[name].done)
            figures["over_rest_rule_interval"] = speedup_interval(*columns, *base, seed=seed)
    return results


def rebuild(opened: Store, folder: Path) -> float:
    """Seconds to write the store again, from documents in memory."""
    batches = [[Document(meta["id"], ids)] for meta, ids in opened.documents()]
    manifest = replace(opened.manifest, segments=[], next_segment=1)
    began = time.perf_counter()
    build(folder, manifest, lambda skip: iter(batches[skip:]), make_parts, job={})
    return time.perf_counter() - began


def _in_ms(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures to show, with times in milliseconds."""
    names = ("accepted_length", "accepted_length_interval", "hit_rate", "nodes_per_step", "acceptance_rate")
    shown = {name: figures[name] for name in names}
    return shown | {f"propose_p{rank}_ms": figures[f"propose_p{rank}_s"] * 1e3 for rank in (50, 99)}


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


def _has_peer() -> bool:
    return importlib.util.find_spec(PEER) is not None


class DraftRetriever:
    """REST's own rule as a drafter. `seconds` lists the time of each search, without that of building the draft."""

    name = "draftretriever"
    origin = ""
    features: tuple[str, ...] = ()
    forward_seconds = 0.0
    bytes_moved = 0

    def __init__(self, index: Path, nodes: int = 64, longest: int = 16, shortest: int = 2) -> None:
        import draftretriever

        self.nodes = nodes
        self.spans = range(longest, shortest - 1, -1)
        self.seconds: list[float] = []
        self._reader: Any = draftretriever.Reader(str(index))

    def pass_timers(self) -> dict[str, PassTimer]:
        return {}

    @classmethod
    def build(cls, index: Path, documents: Iterable[list[int]], vocab_size: int, nodes: int) -> DraftRetriever:
        import draftretriever

        if vocab_size > 1 << 16:
            raise ValueError(f"draftretriever keeps ids in 16 bits, and this vocabulary has {vocab_size}")
        writer = draftretriever.Writer(str(index), vocab_size)
        for document in documents:
            writer.add_entry(document)
        writer.finalize()
        return cls(index, nodes)

    def bind(self, target: Target) -> None:
        pass

    def open(self, rows: Sequence[Row]) -> None:
        pass

    def read(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        pass

    def close(self, rows: Sequence[Row]) -> None:
        pass

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        pass

    def abandon(self, rows: Sequence[Row]) -> None:
        pass

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget], policy: Any = None) -> list[Draft]:
        return [self._draft(row.ids, budget) for row, budget in zip(rows, budgets)]

    def _draft(self, ids: list[int], budget: Budget) -> Draft:
        draft = Draft()
        for path in self._paths(ids) if budget.depth else ():
            parent = ROOT
            for token in path[: budget.depth]:
                if draft.child(parent, token) is None and len(draft) >= budget.nodes:
                    break
                parent = draft.outright(parent, token, self.name)
        return draft

    def _paths(self, ids: list[int]) -> list[list[int]]:
        began = time.perf_counter()
        paths: list[list[int]] = []
        for span in self.spans:
            if span <= len(ids):
                paths = self._reader.search(ids[-span:], choices=self.nodes)[0]
                if paths:
                    break
        self.seconds.append(time.perf_counter() - began)
        # Paths are padded with negative numbers.
        return [[token for token in path if token >= 0] for path in paths]


if __name__ == "__main__":
    run_study(rest_against_peer)
