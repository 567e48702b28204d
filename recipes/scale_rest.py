"""`draftsmith store scale`: a rest store of any size from little text, built and queried, with time and memory.

The text is the given documents over and over in random order, one token in ten replaced by a draw from all of them, so
that matches are as frequent as in real text and no long passage stands twice. Building and querying run in processes of
their own, whose memory is theirs alone.
"""

from __future__ import annotations

import json as json_module
import multiprocessing
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from draftsmith.retrieval.documents import Document

VARIED = 0.1


def scale_rest(
    *,
    store: str,
    out: str,
    tokens: int = 100_000_000,
    steps: int = 4000,
    max_resident_mb: int = 0,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Build and query a large store made of a small one's documents, and print what it took.

    Args:
        store: a rest store whose documents are varied.
        out: folder of the large store; it is deleted afterwards.
        tokens: size of the large store.
        steps: how many drafts are timed.
        max_resident_mb: the drafter's option of that name.
        seed: of the variation.
        json: print one JSON object on the last line.
    """
    spawn = multiprocessing.get_context("spawn")
    figures: dict[str, Any] = {"tokens": tokens}
    try:
        for work, arguments in (
            (_build, (store, out, tokens, seed)),
            (_query, (store, out, steps, max_resident_mb, seed + 1)),
        ):
            with spawn.Pool(1) as pool:
                figures |= pool.apply(work, arguments)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    figures["reader_private_growth"] = figures["reader_private_mb"] / figures["store_mb"]
    figures["reader_mapped_growth"] = figures["reader_mapped_mb"] / figures["store_mb"]
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):<24}{value:>14,.3f}")
    if json:
        print(json_module.dumps(figures))


def _varied(store: str, seed: int) -> Iterator[list[Document]]:
    """The store's documents without end, varied."""
    import numpy as np

    from draftsmith.retrieval.documents import Document
    from draftsmith.retrieval.store import Store

    documents = [ids.astype(np.int64) for _, ids in Store.open(store).documents()]
    every = np.concatenate(documents)
    rng = np.random.default_rng(seed)
    while True:
        for number in rng.permutation(len(documents)):
            ids: np.ndarray = documents[number].copy()
            changed = rng.random(len(ids)) < VARIED
            ids[changed] = every[rng.integers(len(every), size=int(changed.sum()))]
            yield [Document(str(number), ids)]


def _build(store: str, out: str, tokens: int, seed: int) -> dict[str, float]:
    import resource
    from dataclasses import replace

    from draftsmith.retrieval.rest_build import make_parts
    from draftsmith.retrieval.store import Store
    from draftsmith.retrieval.store_writer import build

    def batches(skip: int) -> Iterator[list[Document]]:
        made = 0
        for batch in _varied(store, seed):
            yield batch
            made += sum(len(document.ids) for document in batch)
            if made >= tokens:
                return

    manifest = replace(Store.open(store).manifest, segments=[], next_segment=1)
    empty = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    for _ in batches(0):
        pass
    making = time.perf_counter() - began
    began = time.perf_counter()
    built = build(Path(out), manifest, batches, make_parts, job={})
    return {
        "text_s": making,
        "build_s": time.perf_counter() - began - making,
        "build_peak_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - empty) / 1024,
        "store_mb": built.bytes / 2**20,
        "segments": len(built.segments),
        "bytes_per_token": built.bytes / built.tokens,
    }


def _query(store: str, out: str, steps: int, max_resident_mb: int, seed: int) -> dict[str, float]:
    """Draft along documents that are not in the store; the small store is bound first, so that code is not counted."""
    from draftsmith.infer.contract import Budget
    from draftsmith.infer.generate import generate
    from draftsmith.infer.recorded_target import RecordedTarget
    from draftsmith.infer.row import Row, Stops
    from draftsmith.retrieval import Rest
    from draftsmith.retrieval.store import Store

    vocab_size = Store.open(store).manifest.vocab_size
    seconds: list[float] = []
    committed = 0

    def run(drafter: Rest, wanted: int) -> None:
        nonlocal committed
        left = wanted
        for (document,) in _varied(store, seed):
            ids = document.ids.tolist()
            if len(ids) < 16:
                continue
            target = RecordedTarget({"0": ids[8:]}, vocab_size)
            if not seconds:
                drafter.bind(target)
            row = Row("0", ids[:8], stops=Stops(len(ids) - 8))
            traces = generate(target, drafter, [row], budget=Budget(64, 64))[0].traces
            seconds.extend(trace.propose_s for trace in traces)
            committed += sum(trace.committed for trace in traces)
            left -= len(traces)
            if left <= 0:
                return

    small = Rest(store)
    run(small, 200)
    seconds.clear()
    committed = 0
    private, mapped = _memory()
    large = Rest(out, max_resident_mb=max_resident_mb)
    run(large, steps)
    now_private, now_mapped = _memory()
    ordered = sorted(seconds)
    return {
        "accepted_length": committed / len(seconds),
        "propose_p50_ms": ordered[len(ordered) // 2] * 1e3,
        "propose_p99_ms": ordered[int(len(ordered) * 0.99)] * 1e3,
        "reader_private_mb": now_private - private,
        "reader_mapped_mb": now_mapped - mapped,
    }


def _memory() -> tuple[float, float]:
    """MB of this process's own, and of mapped files that happen to be resident and that the kernel drops at will."""
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(told["RssAnon"].split()[0]) / 1024, int(told["RssFile"].split()[0]) / 1024
