"""FAISS indexes (inner product): exact (flat), a graph (HNSW), or compressed cells (IVF-PQ; cells.py: of many keys).

FAISS is imported where it is used. Keys are added by one thread, so that the same keys give the same file.

Legend: N keys or queries, K key dimensions, C neighbours.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from draftsmith.retrieval.dresd.work import whole_file

IndexKind = Literal["auto", "flat", "hnsw", "ivfpq"]
# Where the lists of compressed cells are while a store is searched.
Lists = Literal["memory", "disk"]
FLAT_UP_TO = 20_000
HNSW_UP_TO = 10_000_000
# Links per key, and candidates examined while building and searching.
LINKS, BUILD_EFFORT, SEARCH_EFFORT = 32, 100, 128
CELLS_SEARCHED = 32
BLOCK = 65_536
# Of the codes of compressed keys, and the keys that FAISS wants to learn them from.
CODE_BITS = 8
TRAINING_KEYS = 39 << CODE_BITS


def load_faiss() -> Any:
    """Import FAISS; ValueError says how to install it."""
    try:
        import faiss
    except ModuleNotFoundError as error:
        if error.name != "faiss":
            raise
        raise ValueError(
            "faiss is not installed: pip install 'draftsmith[retrieval]' (retrieval-gpu for its CUDA build)"
        ) from error
    return faiss


def choose(kind: IndexKind, keys: int) -> IndexKind:
    """Resolve `auto`: exact while a search takes about a millisecond, a graph while it fits in memory, else cells."""
    if kind not in ("auto", "flat", "hnsw", "ivfpq"):
        raise ValueError(f"unknown index {kind!r}: auto, flat, hnsw or ivfpq")
    if kind != "auto":
        return kind
    return "flat" if keys <= FLAT_UP_TO else "hnsw" if keys <= HNSW_UP_TO else "ivfpq"


def check_index(kind: IndexKind, lists: Lists = "memory") -> None:
    """ValueError for an unknown kind, or lists on disk of an index that has none."""
    choose(kind, 0)
    if lists not in ("memory", "disk"):
        raise ValueError(f"unknown lists {lists!r}: memory or disk")
    if lists == "disk" and kind != "ivfpq":
        raise ValueError(f"lists on disk are those of an ivfpq index, and the index is {kind}: add --index ivfpq")


def check_trainable(keys: int, dims: int) -> None:
    """ValueError where compressed cells cannot be made."""
    if keys < TRAINING_KEYS:
        raise ValueError(
            f"an ivfpq index needs {TRAINING_KEYS} keys for training, and there are {keys}: use flat or hnsw"
        )
    if dims % 2:
        raise ValueError(f"an ivfpq index needs an even number of key dimensions, not {dims}")


@contextmanager
def one_thread() -> Iterator[None]:
    """FAISS uses one thread in this block."""
    faiss = load_faiss()
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


def make_index(kind: IndexKind, keys_NK: np.ndarray, seed: int = 0) -> Any:
    """An index of all keys, added block by block; `keys_NK` may be a memory map."""
    faiss = load_faiss()
    kind = choose(kind, len(keys_NK))
    dims = keys_NK.shape[1]
    if kind == "flat":
        index = faiss.IndexFlatIP(dims)
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(dims, LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = BUILD_EFFORT
    else:
        index = train_cells(keys_NK, seed)
    with one_thread():
        for start in range(0, len(keys_NK), BLOCK):
            index.add(np.ascontiguousarray(keys_NK[start : start + BLOCK], dtype=np.float32))
    set_effort(index, 0)
    return index


def train_cells(keys_NK: np.ndarray, seed: int) -> Any:
    """Compressed cells without keys, trained on a sample of the keys."""
    faiss = load_faiss()
    count, dims = keys_NK.shape
    check_trainable(count, dims)
    cells = min(max(int(4 * math.sqrt(count)), 1), count // 39)
    quantizer = faiss.IndexFlatIP(dims)
    index = faiss.IndexIVFPQ(quantizer, dims, cells, dims // 2, CODE_BITS, faiss.METRIC_INNER_PRODUCT)
    # The Python object would free the quantizer at the end of this function: hand it over to the index.
    quantizer.this.disown()
    index.own_fields = True
    index.cp.seed = index.pq.cp.seed = seed + 1
    sample = np.sort(np.random.default_rng(seed).permutation(count)[: max(64 * cells, 64 << CODE_BITS)])
    index.train(np.ascontiguousarray(keys_NK[sample], dtype=np.float32))
    return index


def set_effort(index: Any, effort: int) -> None:
    """How many candidates (HNSW) or cells (IVF-PQ) a search examines; an exact index has no such setting."""
    if hasattr(index, "hnsw"):
        index.hnsw.efSearch = effort or SEARCH_EFFORT
    elif hasattr(index, "nprobe"):
        index.nprobe = effort or CELLS_SEARCHED


def write_index(index: Any, path: Path) -> None:
    faiss = load_faiss()
    with whole_file(path) as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def read_index(path: Path, threads: int = 1) -> Any:
    """An index to search; FAISS searches with `threads` from now on. Lists on disk are in the index's folder."""
    faiss = load_faiss()
    faiss.omp_set_num_threads(threads)
    try:
        if not lists_of(path).exists():
            return faiss.read_index(str(path))
        with quiet():
            index = faiss.read_index(str(path), faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY)
    except RuntimeError as problem:
        raise ValueError(f"{path} is damaged: FAISS cannot read it ({str(problem).splitlines()[0]})") from problem
    # By default each search starts 32 threads that read ahead, which takes ten times as long as the search.
    faiss.downcast_InvertedLists(index.invlists).prefetch_nthread = 0
    return index


def lists_of(index: Path) -> Path:
    """The file of an index's lists on disk."""
    return index.with_suffix(".lists")


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing reaches this process's output: FAISS prints what it does with lists on disk."""
    sys.stdout.flush()
    kept, nowhere = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # C's own buffer
        for number, copy in zip((1, 2), kept):
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)


def stored_keys(index: Any, offsets: np.ndarray) -> np.ndarray:
    """[N, K]: the keys at these offsets, as stored in the index (IVF-PQ compresses them)."""
    if hasattr(index, "make_direct_map"):
        index.make_direct_map()
    return np.stack([index.reconstruct(int(offset)) for offset in offsets])


def search(index: Any, keys_NK: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """[N, C] similarities and offsets, sorted by similarity, then by offset, whatever the index's own order."""
    sims_NC, offsets_NC = index.search(np.ascontiguousarray(keys_NK, dtype=np.float32), count)
    order_NC = np.lexsort((offsets_NC, -sims_NC), axis=-1)
    return np.take_along_axis(sims_NC, order_NC, -1), np.take_along_axis(offsets_NC, order_NC, -1)
