"""Build a DReSD store (arXiv 2502.15572): samples -> target states -> z-score, PCA, unit length -> a FAISS index.

Every emitted token has a key, made from the state that predicted it. So has a prompt's last token, the first step's
query; the rest of a prompt is context and is not stored. All slow results are kept, shard by shard, in a folder beside
the store (work.py), from which a killed build resumes; the store itself appears complete, by one rename.

Legend: N keys, T positions, D hidden, K key dimensions.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from draftsmith.infer.contract.protocols import Target
from draftsmith.infer.files.workers import InProcess, Workers
from draftsmith.infer.text.rendering import Rendered
from draftsmith.infer.text.tokenizer import tokenizer_fingerprint
from draftsmith.retrieval.dresd.calibration import calibrate
from draftsmith.retrieval.dresd.cells import build_cells
from draftsmith.retrieval.dresd.embedding import Embedder, Progress, embed_all
from draftsmith.retrieval.dresd.index import (
    IndexKind,
    Lists,
    check_index,
    check_trainable,
    choose,
    lists_of,
    load_faiss,
    make_index,
    read_index,
    set_effort,
    write_index,
)
from draftsmith.retrieval.dresd.projection import Projection
from draftsmith.retrieval.dresd.store import ENDS, INDEX, KIND, LISTS, PROJECTION, TOKENS, token_dtype
from draftsmith.retrieval.dresd.work import ALL_KEYS, BuildFolder, Sequences, gather, shards
from draftsmith.retrieval.store.format import locked, part_of, parts_to_json, unfinished, write_array, write_manifest


def build_store(
    target: Target,
    samples: Callable[[], Iterable[Rendered]],
    out: Path,
    *,
    feature: str = "last",
    index: IndexKind = "auto",
    lists: Lists = "memory",
    dims: int = 64,
    fit_positions: int = 1_000_000,
    shard_positions: int = 32_768,
    batch_positions: int = 8_192,
    max_length: int = 2_048,
    seed: int = 0,
    source: dict[str, Any] | None = None,
    facts: Callable[[], dict[str, Any]] = dict,
    progress: Progress | None = None,
    filled: Progress | None = None,
    workers: Workers | None = None,
    load: Callable[[], Target] | None = None,
) -> dict[str, Any]:
    """Build a store of what the target emits in `samples`; returns its manifest.

    Args:
        samples: called once, unless an interrupted build has already read them.
        out: a new folder.
        feature: `last` (after the final norm) or `layer:k` (before layer k).
        index: flat, hnsw or ivfpq; auto chooses by the number of keys.
        lists: of an ivfpq index: in memory, or on disk, from where a search maps them.
        dims: dimensions of a key.
        fit_positions: about how many keys, from random documents, to fit the projection on.
        shard_positions: keys per shard, the unit in which a killed build resumes.
        batch_positions: positions per forward pass, padding included.
        max_length: longer sequences are embedded in parts.
        seed: of the order of documents and of the index.
        source: identifies the samples' data; a killed build is resumed only with the same source.
        facts: called at the end for further entries of the manifest.
        progress: called after every shard, and by many workers also within them.
        filled: called with the keys that an ivfpq index has and will have.
        workers: what embeds the shards and fills an ivfpq index; default: this process.
        load: how another worker loads the target.
    """
    load_faiss()
    for name, value in (("dims", dims), ("fit_positions", fit_positions), ("shard_positions", shard_positions)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if max_length < 8:
        raise ValueError(f"max_length must be at least 8, not {max_length}")
    check_index(index, lists)
    if out.exists():
        raise ValueError(f"{out} already exists: name a new folder, or delete it")
    max_length = min(max_length, target.max_positions - 1)
    identity = {"target": target.fingerprint(), "feature": feature, "vocab_size": target.vocab_size}
    plan = identity | {"index": index, "dims": dims, "fit_positions": fit_positions, "seed": seed}
    plan |= {"shard_positions": shard_positions, "batch_positions": batch_positions, "max_length": max_length}
    began = time.perf_counter()
    with locked(unfinished(out)):
        work = BuildFolder(unfinished(out))
        work.begin(plan | {"source": source})
        sequences = work.sequences(lambda: _gather(samples(), target.vocab_size, max_length, index, dims))
        groups = shards(sequences, shard_positions, seed)
        kind = choose(index, len(sequences.tokens()))
        workers = workers or InProcess()
        assert workers.in_process or load is not None
        embedder = Embedder(work.folder.absolute(), plan, load if not workers.in_process and load else lambda: target)
        projection, variance, speed = embed_all(embedder, work, sequences, groups, workers, progress)
        done = work.folder / "store"
        shutil.rmtree(done, ignore_errors=True)
        done.mkdir()
        keys_NK = _assemble(work, sequences, groups)
        place = done / "index.faiss"
        if kind == "ivfpq":
            build_cells(work, keys_NK, seed, workers, place, lists, filled)
        else:
            write_index(make_index(kind, keys_NK, seed), place)
        counted = _write_parts(done, sequences, keys_NK, projection, target, kind, seed)
        tokenizer = target.tokenizer
        manifest = identity | {"tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer)} | counted
        manifest["variance_held"] = round(variance, 4)
        manifest["build"] = {
            "positions": len(sequences.ids_T),
            "embedded_positions_per_s": round(speed, 1),
            "seconds": round(time.perf_counter() - began, 1),
        }
        write_manifest(done, KIND, manifest | facts())
        os.replace(done, out)
        shutil.rmtree(work.folder)
    return manifest


def _write_parts(
    folder: Path,
    sequences: Sequences,
    keys_NK: np.ndarray,
    projection: Projection,
    target: Target,
    kind: IndexKind,
    seed: int,
) -> dict[str, Any]:
    """Write all parts of the store but its index and manifest; returns the manifest's entries of all parts."""
    place = folder / "index.faiss"
    made = read_index(place, load_faiss().omp_get_max_threads())
    set_effort(made, 0)
    projection.write(folder / "projection.bin")
    tokens_N = sequences.tokens().astype(token_dtype(target.vocab_size))
    parts = {
        TOKENS: write_array(folder, "tokens.bin", tokens_N),
        ENDS: write_array(folder, "ends.bin", sequences.ends.astype("<u8")),
        PROJECTION: part_of(folder, "projection.bin"),
        INDEX: part_of(folder, place.name),
    }
    if lists_of(place).exists():
        parts[LISTS] = part_of(folder, lists_of(place).name)
    return {
        "counts": {"documents": len(sequences.ends), "tokens": len(tokens_N)},
        "parts": parts_to_json(parts),
        "hidden_size": int(projection.matrix_KD.shape[1]),
        "dims": int(keys_NK.shape[1]),
        "index": kind,
        "keys": len(keys_NK),
        "documents": len(sequences.ends),
        "calibration": calibrate(made, keys_NK, tokens_N, sequences.ends, seed).to_json(),
    }


def _gather(samples: Iterable[Rendered], vocab_size: int, max_length: int, index: IndexKind, dims: int) -> Sequences:
    """All samples as sequences, refused if they are too few. An empty store would draft nothing."""
    sequences = gather(samples, vocab_size, max_length)
    keys = len(sequences.tokens())
    if keys < 2:
        raise ValueError("the data has no two tokens that the target could have emitted: a store needs some answers")
    if choose(index, keys) == "ivfpq":
        check_trainable(keys, dims)
    return sequences


def _assemble(work: BuildFolder, sequences: Sequences, groups: list[np.ndarray]) -> np.ndarray:
    """[N, K]: all keys in the stream's order, as a memory map."""
    counts = sequences.counts()
    firsts = np.concatenate([[0], np.cumsum(counts)])
    width = work.load("keys", 0).shape[1]
    path = work.folder / ALL_KEYS
    keys_NK = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(int(firsts[-1]), width))
    for number, group in enumerate(groups):
        shard, at = work.load("keys", number), 0
        for part in group:
            keys_NK[firsts[part] : firsts[part + 1]] = shard[at : at + counts[part]]
            at += counts[part]
    return keys_NK
