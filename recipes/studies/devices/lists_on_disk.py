"""A DReSD store's compressed cells in memory and on disk: what they take to build, to hold and to search.

    python -m draftsmith.recipes.studies.devices.lists_on_disk --keys 200000 --dims 128

The keys are random, clustered as a target's are. Each search runs in its own process, so that its memory is its own:
`anonymous` cannot be given back, `mapped` is the file's pages that were read, which the system may drop.
"""

from __future__ import annotations

import json as json_module
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np

from draftsmith.infer.files.workers import open_workers
from draftsmith.recipes.studies import run_study
from draftsmith.retrieval.dresd.cells import build_cells
from draftsmith.retrieval.dresd.index import Lists, lists_of, load_faiss, read_index, search, set_effort
from draftsmith.retrieval.dresd.quality import query_ms
from draftsmith.retrieval.dresd.work import ALL_KEYS, BuildFolder

NEIGHBOURS = 50


def lists_on_disk(
    *,
    keys: int = 200_000,
    dims: int = 128,
    queries: int = 500,
    seed: int = 0,
    ray: str | None = None,
    ray_workers: int | None = None,
    json: bool = False,
) -> dict[str, Any]:
    """Build the cells of random keys both ways, and search each in a process of its own.

    Args:
        keys: how many.
        dims: of a key.
        queries: single searches, of keys that are not stored.
        seed: of the keys and of the cells.
        ray: fill the cells on many workers, as `store build dresd` does.
        ray_workers: how many.
        json: print one JSON object on the last line.
    """
    found: dict[str, Any] = {"keys": keys, "dims": dims}
    answers = []
    with tempfile.TemporaryDirectory() as name, open_workers(ray, ray_workers) as workers:
        work = BuildFolder(Path(name) / "work")
        work.folder.mkdir()
        stored = np.lib.format.open_memmap(work.folder / ALL_KEYS, mode="w+", dtype=np.float32, shape=(keys, dims))
        random_keys(stored, seed)
        for lists in get_args(Lists):  # the second build finds the ranges of the first, and merges only
            out = Path(name) / f"{lists}.faiss"
            began, spent = time.perf_counter(), time.process_time()
            build_cells(work, stored, seed, workers, out, lists)
            took = {"build_s": time.perf_counter() - began, "build_cpu_s": time.process_time() - spent}
            size = sum(path.stat().st_size for path in (out, lists_of(out)) if path.exists()) / 1e6
            figures, answer = _apart(_search, out, queries, dims, seed)
            found[lists] = {"mb": size, **took, **figures}
            answers.append(answer)
    found["same_neighbours"] = bool(np.array_equal(*answers))
    if json:
        print(json_module.dumps(found))
    else:
        print("\n".join(_lines(found)))
    return found


def random_keys(keys_NK: np.ndarray, seed: int) -> None:
    """Fill an array with clusters in directions of falling variance, of length one."""
    generator = np.random.default_rng(seed)
    spread_K = 1 / np.arange(1, keys_NK.shape[1] + 1) ** 0.7
    centres = generator.normal(size=(max(len(keys_NK) // 20, 1), keys_NK.shape[1])) * spread_K
    for start in range(0, len(keys_NK), 65_536):
        block = keys_NK[start : start + 65_536]
        around = centres[generator.integers(0, len(centres), len(block))]
        block[:] = around + 0.4 * generator.normal(size=block.shape) * spread_K
        block /= np.linalg.norm(block, axis=1, keepdims=True)


def _search(path: Path, queries: int, dims: int, seed: int) -> tuple[dict[str, float], np.ndarray]:
    """Memory beyond what this process, FAISS and the queries take, times, and the neighbours found."""
    asked = np.empty((queries, dims), dtype=np.float32)
    random_keys(asked, seed + 1)
    load_faiss()
    empty = _memory()
    index = read_index(path)
    set_effort(index, 0)
    opened = _memory()
    speed = query_ms(index, asked, NEIGHBOURS, queries)
    searched = _memory()
    figures = {"opened_anonymous_mb": opened[0] - empty[0], "anonymous_mb": searched[0] - empty[0]}
    figures |= {"mapped_mb": searched[1] - empty[1], "query_p50_ms": speed["p50"], "query_p99_ms": speed["p99"]}
    return figures, search(index, asked, NEIGHBOURS)[1]


def _apart(work: Callable[..., Any], *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def _memory() -> tuple[float, float]:
    """(anonymous, mapped from files) MB that this process holds."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status["RssAnon"].split()[0]) / 1024, int(status["RssFile"].split()[0]) / 1024


def _lines(found: dict[str, Any]) -> list[str]:
    same = "the same neighbours" if found["same_neighbours"] else "DIFFERENT neighbours"
    lines = [f"{found['keys']:,} keys of {found['dims']} dimensions; {same} from both"]
    for lists in get_args(Lists):
        each = found[lists]
        built = "built" if lists == get_args(Lists)[0] else "merged"
        lines.append(
            f"{lists}: {each['mb']:.1f} MB, {built} in {each['build_s']:.1f} s ({each['build_cpu_s']:.1f} CPU s); "
            f"opened {each['opened_anonymous_mb']:.1f} MB, searched {each['anonymous_mb']:.1f} MB and "
            f"{each['mapped_mb']:.1f} MB mapped; a query {each['query_p50_ms']:.2f} ms, p99 {each['query_p99_ms']:.2f}"
        )
    return lines


if __name__ == "__main__":
    run_study(lists_on_disk)
