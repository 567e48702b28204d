"""FAISS indexes (inner product): exact (flat), a graph (HNSW), or compressed cells (IVF-PQ).

FAISS is imported where it is used. A graph is built by one thread, so that the same keys give the same file.

Legend: N keys or queries, K key dimensions, C neighbours.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np

IndexKind = Literal["auto", "flat", "hnsw", "ivfpq"]
FLAT_UP_TO = 20_000
HNSW_UP_TO = 10_000_000
# Links per key, and candidates examined while building and searching.
LINKS, BUILD_EFFORT, SEARCH_EFFORT = 32, 100, 128
CELLS_SEARCHED = 32
BLOCK = 65_536


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
        index = _train_cells(faiss, keys_NK, seed)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1 if kind == "hnsw" else threads)
    try:
        for start in range(0, len(keys_NK), BLOCK):
            index.add(np.ascontiguousarray(keys_NK[start : start + BLOCK], dtype=np.float32))
    finally:
        faiss.omp_set_num_threads(threads)
    set_effort(index, 0)
    return index


def _train_cells(faiss: Any, keys_NK: np.ndarray, seed: int) -> Any:
    count, dims = keys_NK.shape
    bits = 8
    if count < 39 << bits:
        raise ValueError(
            f"an ivfpq index needs {39 << bits} keys for training, and there are {count}: use flat or hnsw"
        )
    if dims % 2:
        raise ValueError(f"an ivfpq index needs an even number of key dimensions, not {dims}")
    cells = min(max(int(4 * math.sqrt(count)), 1), count // 39)
    quantizer = faiss.IndexFlatIP(dims)
    index = faiss.IndexIVFPQ(quantizer, dims, cells, dims // 2, bits, faiss.METRIC_INNER_PRODUCT)
    # The Python object would free the quantizer at the end of this function: hand it over to the index.
    quantizer.this.disown()
    index.own_fields = True
    index.cp.seed = index.pq.cp.seed = seed + 1
    sample = np.sort(np.random.default_rng(seed).permutation(count)[: max(64 * cells, 64 << bits)])
    index.train(np.ascontiguousarray(keys_NK[sample], dtype=np.float32))
    return index


def set_effort(index: Any, effort: int) -> None:
    """How many candidates (HNSW) or cells (IVF-PQ) a search examines; an exact index has no such setting."""
    if hasattr(index, "hnsw"):
        index.hnsw.efSearch = effort or SEARCH_EFFORT
    elif hasattr(index, "nprobe"):
        index.nprobe = effort or CELLS_SEARCHED


def write_index(index: Any, path: Path) -> None:
    load_faiss().write_index(index, str(path))


def read_index(path: Path, threads: int = 1) -> Any:
    faiss = load_faiss()
    faiss.omp_set_num_threads(threads)
    try:
        return faiss.read_index(str(path))
    except RuntimeError as problem:
        raise ValueError(f"{path} is damaged: FAISS cannot read it ({str(problem).splitlines()[0]})") from problem


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
