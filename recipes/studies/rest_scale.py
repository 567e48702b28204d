"""REST stores of any size: time and memory to build and to query them, and how these grow.

    python -m draftsmith.recipes.studies.rest_scale --store STORE --out big --tokens 1000000 10000000

The text is a small store's documents, repeated in random order, with one token in ten replaced by a random one from the
store, so that matches are as frequent as in real text but no long passage repeats. Building and querying each run in
their own process, so that memory is measured separately.
"""

from __future__ import annotations

import json as json_module
import math
import multiprocessing
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from draftsmith.infer.contract.protocols import Budget
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.models.recorded_target import RecordedTarget
from draftsmith.recipes.studies import run_study
from draftsmith.retrieval.rest.build import make_parts
from draftsmith.retrieval.rest.drafter import Rest
from draftsmith.retrieval.store.documents import Document
from draftsmith.retrieval.store.segments import Store
from draftsmith.retrieval.store.writer import CHUNK_TOKENS, build

VARIED = 0.1
PROMPT = 8
WARM_UP = 200


def rest_scale(
    *,
    store: str,
    out: str,
    tokens: Sequence[int] = (100_000_000,),
    steps: int = 4000,
    chunk_tokens: int = CHUNK_TOKENS,
    max_mapped_mb: float = 256,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Build and query large stores made of a small one's documents, and print time and memory.

    Args:
        store: a rest store, whose documents are varied.
        out: folder of the large store, which is deleted afterwards.
        tokens: sizes of the large stores; with two or more, the growth of build time is printed.
        steps: how many drafts to time.
        chunk_tokens: tokens per segment.
        max_mapped_mb: the drafter's option of that name.
        seed: of the variation.
        json: print one JSON object on the last line.
    """
    found = []
    for size in tokens:
        print(f"{size:,} tokens", file=sys.stderr, flush=True)
        figures: dict[str, float] = {"tokens": size}
        try:
            figures |= _apart(build_large, store, out, size, seed, chunk_tokens)
            figures |= _apart(query_large, store, out, steps, max_mapped_mb, seed + 1)
        finally:
            shutil.rmtree(out, ignore_errors=True)
        found.append(figures | {"reader_growth_share": figures["reader_peak_mb"] / figures["store_mb"]})
    for name in found[0]:
        print(f"{name.replace('_', ' '):<24}" + "".join(f"{figures[name]:>18,.3f}" for figures in found))
    results: dict[str, object] = {"sizes": found} if len(found) > 1 else dict(found[0])
    if len(set(tokens)) > 1:
        results["build_growth"] = growth(tokens, [figures["build_cpu_s"] for figures in found])
        results["query_growth"] = growth(tokens, [figures["propose_p50_ms"] for figures in found])
        print(f"build time grows as (n log n) to the power of {results['build_growth']:.2f}")
    if json:
        print(json_module.dumps(results))


def growth(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The power of n log n by which the seconds grow, by least squares on logarithms."""
    if len(set(sizes)) < 2:
        raise ValueError("growth needs at least two sizes")
    x = np.log([size * math.log(size) for size in sizes])
    y = np.log(np.asarray(seconds))
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def varied(store: str, seed: int) -> Iterator[list[Document]]:
    """The store's documents, varied, in an endless stream."""
    documents = [ids.astype(np.int64) for _, ids in Store.open(store).documents()]
    every = np.concatenate(documents)
    rng = np.random.default_rng(seed)
    while True:
        for number in rng.permutation(len(documents)):
            ids: np.ndarray = documents[number].copy()
            changed = rng.random(len(ids)) < VARIED
            ids[changed] = every[rng.integers(len(every), size=int(changed.sum()))]
            yield [Document(str(number), ids)]


def build_large(store: str, out: str, tokens: int, seed: int, chunk_tokens: int) -> dict[str, float]:
    """Seconds and peak memory of a build, without the time for making its text. CPU seconds do not depend on what else
    the machine does."""
    text_s = text_cpu_s = 0.0

    def batches(skip: int) -> Iterator[list[Document]]:
        nonlocal text_s, text_cpu_s
        made, source = 0, varied(store, seed)
        while made < tokens:
            began, began_cpu = time.perf_counter(), time.process_time()
            batch = next(source)
            text_s += time.perf_counter() - began
            text_cpu_s += time.process_time() - began_cpu
            made += sum(len(document.ids) for document in batch)
            yield batch

    manifest = replace(Store.open(store).manifest, segments=[], next_segment=1)
    empty = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, began_cpu = time.perf_counter(), time.process_time()
    built = build(Path(out), manifest, batches, make_parts, job={}, chunk_tokens=chunk_tokens)
    return {
        "build_s": time.perf_counter() - began - text_s,
        "build_cpu_s": time.process_time() - began_cpu - text_cpu_s,
        "text_s": text_s,
        "build_peak_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - empty) / 1024,
        "store_mb": built.bytes / 2**20,
        "segments": len(built.segments),
        "bytes_per_token": built.bytes / built.tokens,
    }


def query_large(store: str, out: str, steps: int, max_mapped_mb: float, seed: int) -> dict[str, float]:
    """Draft along documents that are not in the store, after a warm-up with the small store.

    `reader_peak_mb` is the process's peak memory above that after the warm-up, mapped pages included.
    """
    _draft(Rest(store), store, seed, WARM_UP)
    _draft(Rest(store, max_mapped_mb=0), store, seed, WARM_UP)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    empty = _memory("VmRSS")
    seconds, committed = _draft(Rest(out, max_mapped_mb=max_mapped_mb), store, seed, steps)
    return {
        "accepted_length": committed / len(seconds),
        **latency("propose", seconds),
        "reader_peak_mb": _memory("VmHWM") - empty,
    }


def _draft(drafter: Rest, store: str, seed: int, steps: int) -> tuple[list[float], int]:
    """The propose seconds of `steps` steps or slightly more, and how many tokens these committed."""
    vocab_size = Store.open(store).manifest.vocab_size
    drafter.bind(RecordedTarget({}, vocab_size))
    seconds: list[float] = []
    committed = 0
    for (document,) in varied(store, seed):
        ids = document.ids.tolist()
        if len(ids) < 2 * PROMPT:
            continue
        target = RecordedTarget({"0": ids[PROMPT:]}, vocab_size)
        row = Row("0", ids[:PROMPT], stops=Stops(len(ids) - PROMPT))
        traces = Engine(target, drafter, budget=Budget(64, 64)).run([row], strict=True)[0].traces
        seconds += [trace.propose_s for trace in traces]
        committed += sum(trace.committed for trace in traces)
        if len(seconds) >= steps:
            break
    return seconds, committed


def _apart(work: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def _memory(what: str) -> float:
    """MB of this process: VmRSS is the current size, VmHWM the peak."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status[what].split()[0]) / 1024


def latency(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile, in milliseconds."""
    ordered = sorted(seconds)
    return {f"{name}_p{rank}_ms": ordered[int(len(ordered) * rank / 100)] * 1e3 for rank in (50, 99)}


if __name__ == "__main__":
    run_study(rest_scale)
