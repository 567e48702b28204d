"""The rest drafter beside REST's own rule: the same documents, the same streams, one process, one decode loop.

Replaying is infer's (measure/replay.py). What is added here: how long a build takes, the peer's package, and the ratio
of accepted_lengths, whose interval is paired by stream.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from draftsmith.infer.contract.protocols import Budget, Drafter
from draftsmith.infer.measure.bootstrap import speedup_interval
from draftsmith.infer.measure.recordings import Recording
from draftsmith.infer.measure.replay import Replay
from draftsmith.retrieval.pld import PromptLookup
from draftsmith.retrieval.rest.build import make_parts
from draftsmith.retrieval.rest.drafter import Rest
from draftsmith.retrieval.store.documents import Document
from draftsmith.retrieval.store.segments import Store
from draftsmith.retrieval.store.writer import build

PEER = "draftretriever"


def has_peer() -> bool:
    return importlib.util.find_spec(PEER) is not None


def compare(
    opened: Store, streams: Sequence[Recording], tokenizer: Any, nodes: int, seed: int, folder: Path
) -> dict[str, dict[str, Any]]:
    """Per drafter: the figures of its replay, seconds to build what it drafts from, its ratio to REST's rule."""
    drafters: dict[str, Drafter] = {
        "rest": Rest(str(opened.path), nodes=nodes, verify=False), "pld": PromptLookup(nodes=nodes)
    }  # fmt: skip
    seconds = {"rest": rebuild(opened, folder / "store"), "pld": 0.0}
    searches: list[float] = []
    if has_peer():
        from draftsmith.recipes.studies.rest_peer import DraftRetriever

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
        base = _columns(replayed[PEER].done)
        for name, figures in results.items():
            figures["over_rest_rule"] = figures["accepted_length"] / results[PEER]["accepted_length"]
            columns = _columns(replayed[name].done)
            figures["over_rest_rule_interval"] = speedup_interval(*columns, *base, seed=seed)
    return results


def rebuild(opened: Store, folder: Path) -> float:
    """Seconds from tokens to a written store, the documents in memory before."""
    batches = [[Document(told["id"], ids)] for told, ids in opened.documents()]
    manifest = replace(opened.manifest, segments=[], next_segment=1)
    began = time.perf_counter()
    build(folder, manifest, lambda skip: iter(batches[skip:]), make_parts, job={})
    return time.perf_counter() - began


def latency(what: str, seconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile, in milliseconds."""
    ordered = sorted(seconds)
    return {f"{what}_p{rank}_ms": ordered[int(len(ordered) * rank / 100)] * 1e3 for rank in (50, 99)}


def _columns(done: Sequence[Any]) -> tuple[list[int], list[int]]:
    """Committed tokens and steps of every stream."""
    committed = [sum(trace.committed for trace in generation.traces) for generation in done]
    return committed, [len(generation.traces) for generation in done]


def _in_ms(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures that are shown, times in milliseconds."""
    names = ("accepted_length", "accepted_length_interval", "hit_rate", "nodes_per_step", "acceptance_rate")
    shown = {name: figures[name] for name in names}
    return shown | {f"propose_p{rank}_ms": figures[f"propose_p{rank}_s"] * 1e3 for rank in (50, 99)}
