"""A rest store of any size from little text, built and queried: time, memory, and how they grow.

The text is a small store's documents over and over in random order, one token in ten replaced by a draw from all of
them, so that matches are as frequent as in real text and no long passage stands twice. Building and querying run in
processes of their own, whose memory is theirs alone.
"""

from __future__ import annotations

import math
import multiprocessing
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from draftsmith.infer.contract.protocols import Budget
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.models.recorded_target import RecordedTarget
from draftsmith.recipes.studies.rest_bench import latency
from draftsmith.retrieval.rest.build import make_parts
from draftsmith.retrieval.rest.drafter import Rest
from draftsmith.retrieval.store.documents import Document
from draftsmith.retrieval.store.segments import Store
from draftsmith.retrieval.store.writer import CHUNK_TOKENS, build

VARIED = 0.1
PROMPT = 8
WARM_UP = 200


def measure(
    store: str, out: str, tokens: int, steps: int, options: dict[str, Any], seed: int, chunk_tokens: int = CHUNK_TOKENS
) -> dict[str, float]:
    """Build a store of `tokens` at `out`, draft from it for `steps` steps, delete it; returns what it took."""
    figures: dict[str, float] = {"tokens": tokens}
    try:
        figures |= _apart(build_large, store, out, tokens, seed, chunk_tokens)
        figures |= _apart(query_large, store, out, steps, options, seed + 1)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return figures | {"reader_growth_share": figures["reader_peak_mb"] / figures["store_mb"]}


def growth(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The power of n log n that the seconds grow with, by least squares on logarithms: at most 1 is no faster."""
    if len(set(sizes)) < 2:
        raise ValueError("growth needs two sizes at least")
    x = np.log([size * math.log(size) for size in sizes])
    y = np.log(np.asarray(seconds))
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def varied(store: str, seed: int) -> Iterator[list[Document]]:
    """The store's documents without end, varied."""
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
    """Seconds and peak memory of a build, less the time that making the text takes; CPU seconds do not see who else
    uses the machine."""
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


def query_large(store: str, out: str, steps: int, options: dict[str, Any], seed: int) -> dict[str, float]:
    """Draft along documents that are not in the store; the small store is used first, so that code is not counted.

    `reader_peak_mb` is the most that the process held above what it held before, the pages that it had mapped included.
    """
    _draft(Rest(store), store, seed, WARM_UP)
    _draft(Rest(store, max_mapped_mb=0), store, seed, WARM_UP)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    empty = _memory("VmRSS")
    seconds, committed = _draft(Rest(out, **options), store, seed, steps)
    return {
        "accepted_length": committed / len(seconds),
        **latency("propose", seconds),
        "reader_peak_mb": _memory("VmHWM") - empty,
    }


def _draft(drafter: Rest, store: str, seed: int, steps: int) -> tuple[list[float], int]:
    """Seconds to propose of `steps` steps or a few more, and the tokens that they committed."""
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
        traces = generate(target, drafter, [row], budget=Budget(64, 64))[0].traces
        seconds += [trace.propose_s for trace in traces]
        committed += sum(trace.committed for trace in traces)
        if len(seconds) >= steps:
            break
    return seconds, committed


def _apart(work: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def _memory(what: str) -> float:
    """MB of this process: VmRSS now, or VmHWM at most."""
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(told[what].split()[0]) / 1024
