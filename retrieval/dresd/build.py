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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from draftsmith.infer.contract.protocols import Target
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.text.rendering import Rendered
from draftsmith.infer.text.tokenizer import tokenizer_fingerprint
from draftsmith.retrieval.dresd.calibration import calibrate
from draftsmith.retrieval.dresd.index import IndexKind, choose, load_faiss, make_index, write_index
from draftsmith.retrieval.dresd.projection import Projection, fit
from draftsmith.retrieval.dresd.store import ENDS, INDEX, KIND, PROJECTION, TOKENS, token_dtype
from draftsmith.retrieval.dresd.work import BuildFolder, Sequences, gather, shards, whole_file
from draftsmith.retrieval.store.format import locked, part_of, parts_to_json, unfinished, write_array, write_manifest

# (positions embedded, positions in total), after every shard.
Progress = Callable[[int, int], None]


def build_store(
    target: Target,
    samples: Callable[[], Iterable[Rendered]],
    out: Path,
    *,
    feature: str = "last",
    index: IndexKind = "auto",
    dims: int = 64,
    fit_positions: int = 1_000_000,
    shard_positions: int = 32_768,
    batch_positions: int = 8_192,
    max_length: int = 2_048,
    seed: int = 0,
    source: dict[str, Any] | None = None,
    facts: Callable[[], dict[str, Any]] = dict,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build a store of what the target emits in `samples`; returns its manifest.

    Args:
        samples: called once, unless an interrupted build has already read them.
        out: a new folder.
        feature: `last` (after the final norm) or `layer:k` (before layer k).
        index: flat, hnsw or ivfpq; auto chooses by the number of keys.
        dims: dimensions of a key.
        fit_positions: about how many keys, from random documents, to fit the projection on.
        shard_positions: keys per shard, the unit in which a killed build resumes.
        batch_positions: positions per forward pass, padding included.
        max_length: longer sequences are embedded in parts.
        seed: of the order of documents and of the index.
        source: identifies the samples' data; a killed build is resumed only with the same source.
        facts: called at the end for further entries of the manifest.
        progress: called after every shard.
    """
    load_faiss()
    for name, value in (("dims", dims), ("fit_positions", fit_positions), ("shard_positions", shard_positions)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if max_length < 8:
        raise ValueError(f"max_length must be at least 8, not {max_length}")
    choose(index, 0)
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
        sequences = work.sequences(lambda: _gather(samples(), target.vocab_size, max_length))
        groups = shards(sequences, shard_positions, seed)
        projection, variance, speed = _embed_all(target, work, sequences, groups, plan, progress)
        done = work.folder / "store"
        shutil.rmtree(done, ignore_errors=True)
        done.mkdir()
        counted = _write_parts(done, sequences, _assemble(work, sequences, groups), projection, target, index, seed)
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
    index: IndexKind,
    seed: int,
) -> dict[str, Any]:
    """Write all parts of the store but its manifest; returns their entries of the manifest."""
    made = make_index(index, keys_NK, seed)
    write_index(made, folder / "index.faiss")
    projection.write(folder / "projection.bin")
    tokens_N = sequences.tokens().astype(token_dtype(target.vocab_size))
    parts = {
        TOKENS: write_array(folder, "tokens.bin", tokens_N),
        ENDS: write_array(folder, "ends.bin", sequences.ends.astype("<u8")),
        PROJECTION: part_of(folder, "projection.bin"),
        INDEX: part_of(folder, "index.faiss"),
    }
    return {
        "counts": {"documents": len(sequences.ends), "tokens": len(tokens_N)},
        "parts": parts_to_json(parts),
        "hidden_size": int(projection.matrix_KD.shape[1]),
        "dims": int(keys_NK.shape[1]),
        "index": choose(index, len(keys_NK)),
        "keys": len(keys_NK),
        "documents": len(sequences.ends),
        "calibration": calibrate(made, keys_NK, tokens_N, sequences.ends, seed).to_json(),
    }


def _gather(samples: Iterable[Rendered], vocab_size: int, max_length: int) -> Sequences:
    """All samples as sequences. An empty store would draft nothing, so it is refused."""
    sequences = gather(samples, vocab_size, max_length)
    if len(sequences.tokens()) < 2:
        raise ValueError("the data has no two tokens that the target could have emitted: a store needs some answers")
    return sequences


def _embed_all(
    target: Target,
    work: BuildFolder,
    sequences: Sequences,
    groups: list[np.ndarray],
    plan: dict[str, Any],
    progress: Progress | None,
) -> tuple[Projection, float, float]:
    """Save the keys of every shard: the first shards' states fit the projection, then all are projected. Returns the
    projection, its share of the variance, and positions embedded per second (0 if all was done before)."""
    seconds, positions = 0.0, 0
    lengths, counts = np.diff(sequences.starts), sequences.counts()
    sizes = [int(counts[group].sum()) for group in groups]

    def states(number: int) -> torch.Tensor:
        nonlocal seconds, positions
        start = time.perf_counter()
        found = _states(target, sequences, groups[number], plan)
        seconds += time.perf_counter() - start
        positions += int(lengths[groups[number]].sum())
        if progress is not None:
            progress(sum(sizes[: number + 1]), sum(sizes))
        return found

    sample = next((i + 1 for i in range(len(groups)) if sum(sizes[: i + 1]) >= plan["fit_positions"]), len(groups))
    fitted = work.folder / "projection.npz"
    if not fitted.exists():
        for number in range(sample):
            if not work.has("states", number):
                work.save("states", number, _pack(states(number)))
        projection, variance = fit((_unpack(work.load("states", number)) for number in range(sample)), plan["dims"])
        with whole_file(fitted) as file:
            np.savez(file, matrix=projection.matrix_KD.numpy(), offset=projection.offset_K.numpy(), variance=variance)
    with np.load(fitted) as saved:
        projection = Projection(torch.from_numpy(saved["matrix"]), torch.from_numpy(saved["offset"]))
        variance = float(saved["variance"])
    for number in range(len(groups)):
        if not work.has("keys", number):
            kept = work.has("states", number)
            raw = _unpack(work.load("states", number)) if kept else states(number)
            work.save("keys", number, projection.keys(raw))
        work.drop("states", number)
    return projection, variance, positions / seconds if seconds else 0.0


def _states(target: Target, sequences: Sequences, group: np.ndarray, plan: dict[str, Any]) -> torch.Tensor:
    """[N, D]: the states that predicted the keyed tokens of a shard's parts."""
    given = [sequences.ids(part) for part in group]
    found = embed(target, given, plan["feature"], plan["batch_positions"])
    keyed = [torch.from_numpy(sequences.keyed(part)[1:]) for part in group]
    return torch.cat([states_TD.cpu()[mask] for states_TD, mask in zip(found, keyed)])


def _pack(states_ND: torch.Tensor) -> np.ndarray:
    """bfloat16 is kept as 16-bit integers, since numpy has no such type."""
    if states_ND.dtype == torch.bfloat16:
        return states_ND.contiguous().view(torch.uint16).numpy()
    return states_ND.float().numpy()


def _unpack(packed: np.ndarray) -> torch.Tensor:
    states = torch.from_numpy(packed)
    return states.view(torch.bfloat16) if packed.dtype == np.uint16 else states


def _assemble(work: BuildFolder, sequences: Sequences, groups: list[np.ndarray]) -> np.ndarray:
    """[N, K]: all keys in the stream's order, as a memory map."""
    counts = sequences.counts()
    firsts = np.concatenate([[0], np.cumsum(counts)])
    width = work.load("keys", 0).shape[1]
    path = work.folder / "all-keys.npy"
    keys_NK = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(int(firsts[-1]), width))
    for number, group in enumerate(groups):
        shard, at = work.load("keys", number), 0
        for part in group:
            keys_NK[firsts[part] : firsts[part + 1]] = shard[at : at + counts[part]]
            at += counts[part]
    return keys_NK


def embed(target: Target, sequences: Sequence[Sequence[int]], feature: str, batch_positions: int) -> list[torch.Tensor]:
    """[T - 1, D] per sequence: state i predicted token i + 1. Sequences of similar length run together.

    States come through `target.prefill`, as the drafter's do, so that stored keys and queries agree. A pass has at most
    `batch_positions` positions, padding included; a longer sequence runs alone.
    """
    order = sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), i))
    found: dict[int, torch.Tensor] = {}
    while order:
        longest = len(sequences[order[-1]])
        chosen = [order.pop() for _ in range(min(max(batch_positions // longest, 1), len(order)))]
        rows = [Row(str(i), list(sequences[i]), stops=Stops(1)) for i in chosen]
        target.admit(rows, (feature,))
        try:
            feedback = target.prefill(rows, longest)
        finally:
            target.release(rows)
        for i, given in zip(chosen, feedback):
            found[i] = given.features[feature]
    return [found[i] for i in range(len(sequences))]
