"""Building a DReSD store: samples -> target states -> z-score, PCA, length one -> a FAISS index (arXiv 2502.15572).

Every emitted token has a key, made from the state that predicted it, and so has a prompt's last token, from which the
first step asks; the rest of a prompt is context and is not stored. All that
takes long is kept, shard by shard, in a folder beside the store (dresd_work.py), from which a build that was
killed goes on; the store itself appears whole, by one rename.

Files, formats and templates are not known here: samples come rendered.

Legend: N keys, D hidden, K key dimensions.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from draftsmith.infer.contract.protocols import Target
from draftsmith.infer.text.rendering import Rendered
from draftsmith.infer.text.tokenizer import tokenizer_fingerprint
from draftsmith.retrieval.dresd.calibration import SimilarityCalibration, fit_curve
from draftsmith.retrieval.dresd.embed import embed
from draftsmith.retrieval.dresd.index import IndexKind, choose, load_faiss, make_index, write_index
from draftsmith.retrieval.dresd.projection import Projection, fit
from draftsmith.retrieval.dresd.store import ENDS, INDEX, KIND, PROJECTION, TOKENS, search, token_dtype
from draftsmith.retrieval.dresd.work import BuildFolder, Sequences, gather, held, shards, whole_file
from draftsmith.retrieval.store.format import part_of, parts_to_json, unfinished, write_array, write_manifest

# What a drafter does unless told otherwise (dresd.py), and so what is calibrated.
NEIGHBOURS, NUM_DRAFTS, LEN_DRAFTS = 50, 10, 10
CALIBRATED_ON = 2_000

# (positions embedded, positions in all), after every shard.
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
        samples: called once, unless an interrupted build has read them already.
        out: the folder to come; it must not exist.
        feature: `last`, or `layer:k`.
        index: flat, hnsw or ivfpq; auto by the number of keys.
        dims: of a key.
        fit_positions: about so many keys, from random documents, fit the projection.
        shard_positions: keys per shard, the unit in which an interrupted build goes on.
        batch_positions: of one pass, padding included.
        max_length: longer sequences are embedded in parts.
        seed: of the order of documents and of the index.
        source: what the samples are made of; an interrupted build with another source is refused.
        facts: what else the manifest is to say, asked for at the end.
        progress: told after every shard.
    """
    load_faiss()
    for name, value in (("dims", dims), ("fit_positions", fit_positions), ("shard_positions", shard_positions)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if max_length < 8:
        raise ValueError(f"max_length must be at least 8, not {max_length}")
    choose(index, 0)
    if out.exists():
        raise ValueError(f"{out} exists already: name a new folder, or delete it")
    max_length = min(max_length, target.max_positions - 1)
    identity = {"target": target.fingerprint(), "feature": feature, "vocab_size": target.vocab_size}
    plan = identity | {"index": index, "dims": dims, "fit_positions": fit_positions, "seed": seed}
    plan |= {"shard_positions": shard_positions, "batch_positions": batch_positions, "max_length": max_length}
    began = time.perf_counter()
    with held(unfinished(out)) as work:
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
    """All parts of the store but its manifest; returns what the manifest says of them."""
    found = make_index(index, keys_NK, seed)
    write_index(found, folder / "index.faiss")
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
        "calibration": calibrate(found, keys_NK, tokens_N, sequences.ends, seed).to_json(),
    }


def _gather(samples: Iterable[Rendered], vocab_size: int, max_length: int) -> Sequences:
    """All samples as sequences; an empty store would draft nothing, and is refused."""
    sequences = gather(samples, vocab_size, max_length)
    if len(sequences.tokens()) < 2:
        raise ValueError("the data hold no two tokens that the target could have emitted: a store needs some text")
    return sequences


def _embed_all(
    target: Target,
    work: BuildFolder,
    sequences: Sequences,
    groups: list[np.ndarray],
    plan: dict[str, Any],
    progress: Progress | None,
) -> tuple[Projection, float, float]:
    """Keys of every shard into the work folder: the first shards' states fit the projection, then all are projected.
    Returns the projection, the variance that it holds, and positions embedded per second (0: all was done before)."""
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
    """bfloat16 stays as wide as it is; numpy knows it as 16 bits."""
    if states_ND.dtype == torch.bfloat16:
        return states_ND.contiguous().view(torch.uint16).numpy()
    return states_ND.float().numpy()


def _unpack(packed: np.ndarray) -> torch.Tensor:
    states = torch.from_numpy(packed)
    return states.view(torch.bfloat16) if packed.dtype == np.uint16 else states


def _assemble(work: BuildFolder, sequences: Sequences, groups: list[np.ndarray]) -> np.ndarray:
    """[N, K]: all keys, in the order of the stream, as a memory map."""
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


def calibrate(
    index: Any, keys_NK: np.ndarray, tokens_N: np.ndarray, ends: np.ndarray, seed: int, sample: int = CALIBRATED_ON
) -> SimilarityCalibration:
    """How often neighbours from other documents go on as a document does, by similarity (dresd_calibration.py)."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(keys_NK))[:sample])
    first: list[tuple[float, bool]] = []
    later: list[tuple[float, bool]] = []
    # The own document takes places among the neighbours: so many more are asked for.
    asked = min(2 * NEIGHBOURS, len(keys_NK))
    for start in range(0, len(chosen), 256):
        block = chosen[start : start + 256]
        sims_NC, offsets_NC = search(index, keys_NK[block], asked)
        for query, sims_C, offsets_C in zip(block, sims_NC, offsets_NC):
            truth = _after(tokens_N, ends, int(query))
            if truth:
                for similarity, offset in _others(query, sims_C, offsets_C, tokens_N, ends):
                    seen = list(_compare(truth, _after(tokens_N, ends, offset)))
                    first.extend((similarity, right) for right in seen[:1])
                    later.extend((similarity, right) for right in seen[1:])
    curves = [fit_curve([seen[0] for seen in pairs], [seen[1] for seen in pairs]) for pairs in (first, later)]
    return SimilarityCalibration(curves[0], curves[1], (len(first), len(later)))


def _others(
    query: int, sims_C: np.ndarray, offsets_C: np.ndarray, tokens_N: np.ndarray, ends: np.ndarray
) -> list[tuple[float, int]]:
    """The neighbours that a drafter would use, had the query's own document not been stored."""
    own = np.searchsorted(ends, query, side="right")
    near = [
        (float(similarity), int(offset))
        for similarity, offset in zip(sims_C, offsets_C)
        if offset >= 0 and np.searchsorted(ends, offset, side="right") != own
    ][:NEIGHBOURS]
    return [(similarity, offset) for similarity, offset in near if tokens_N[offset] == tokens_N[query]][:NUM_DRAFTS]


def _after(tokens_N: np.ndarray, ends: np.ndarray, offset: int) -> list[int]:
    end = int(ends[np.searchsorted(ends, offset, side="right")])
    return [int(token) for token in tokens_N[offset + 1 : min(offset + 1 + LEN_DRAFTS, end)]]


def _compare(truth: list[int], stored: list[int]) -> Iterator[bool]:
    """Right or wrong, token by token, up to the first that is wrong."""
    for wanted, given in zip(truth, stored):
        yield wanted == given
        if wanted != given:
            return
