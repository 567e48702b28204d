"""The keys of a DReSD store, shard by shard: a target's states, and what a projection that is fitted on some makes of
them. Each shard is a task, and its result a file in the build's folder (work.py).

Legend: N keys, T positions, D hidden.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from draftsmith.infer.contract.protocols import Target
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.files.workers import Note, Work, Workers
from draftsmith.retrieval.dresd.projection import Projection, fit
from draftsmith.retrieval.dresd.work import BuildFolder, Sequences, whole_file

# (keys embedded, keys in total).
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class KeyShard:
    """Parts of documents, as token ids and masks of those that have keys. `kept`: keep their states for the fit."""

    number: int
    kept: bool
    ids: list[np.ndarray]
    keyed: list[np.ndarray]


@dataclass(frozen=True, slots=True)
class Embedder:
    """What a worker calls before its first shard."""

    folder: Path
    plan: dict[str, Any]
    load: Callable[[], Target]

    def __call__(self) -> Work:
        target, work = self.load(), BuildFolder(self.folder)
        if target.fingerprint() != self.plan["target"]:
            raise ValueError("the target has other weights on this machine than where the build was begun")
        opened: list[Projection] = []

        def states(shard: KeyShard, note: Note) -> torch.Tensor:
            found = _states(target, shard, self.plan)
            note(len(found), sum(map(len, shard.ids)))
            return found

        def run(shard: KeyShard, note: Note) -> None:
            number = shard.number
            if shard.kept:
                work.save("states", number, _pack(states(shard, note)))
                return
            if not opened:
                opened.append(read_projection(work)[0])
            raw = _unpack(work.load("states", number)) if work.has("states", number) else states(shard, note)
            work.save("keys", number, opened[0].keys(raw))
            work.drop("states", number)

        return run


def embed_all(
    embedder: Embedder,
    work: BuildFolder,
    sequences: Sequences,
    groups: list[np.ndarray],
    workers: Workers,
    progress: Progress | None,
) -> tuple[Projection, float, float]:
    """Save the keys of every shard: the first shards' states fit the projection, then all are projected. Returns the
    projection, its share of the variance, and positions embedded per second (0 if all was done before)."""
    counts, plan = sequences.counts(), embedder.plan
    sizes = [int(counts[group].sum()) for group in groups]
    sample = next((i + 1 for i in range(len(sizes)) if sum(sizes[: i + 1]) >= plan["fit_positions"]), len(sizes))
    before = sum(size for number, size in enumerate(sizes) if work.has("states", number) or work.has("keys", number))
    seconds, positions = 0.0, 0

    def cut(number: int, kept: bool) -> KeyShard:
        parts = groups[number]
        return KeyShard(
            number, kept, [sequences.ids(part) for part in parts], [sequences.keyed(part) for part in parts]
        )

    def run(shards: Iterable[int], kept: bool) -> None:
        nonlocal before, seconds, positions
        start, embedded = time.perf_counter(), (0, 0)

        def note(keys: int, tokens: int) -> None:
            nonlocal embedded
            embedded = keys, tokens
            if progress is not None:
                progress(before + keys, sum(sizes))

        for _ in workers.map(embedder, ((number, cut(number, kept)) for number in shards), note, work.folder):
            pass
        before += embedded[0]
        if embedded[1]:
            seconds, positions = seconds + time.perf_counter() - start, positions + embedded[1]

    if not work.projection.exists():
        run([number for number in range(sample) if not work.has("states", number)], True)
        fitted, variance = fit((_unpack(work.load("states", number)) for number in range(sample)), plan["dims"])
        with whole_file(work.projection) as file:
            np.savez(file, matrix=fitted.matrix_KD.numpy(), offset=fitted.offset_K.numpy(), variance=variance)
    run([number for number in range(len(sizes)) if not work.has("keys", number)], False)
    for number in range(len(sizes)):
        work.drop("states", number)
    return *read_projection(work), positions / seconds if seconds else 0.0


def read_projection(work: BuildFolder) -> tuple[Projection, float]:
    """The projection as it was fitted, and its share of the variance."""
    with np.load(work.projection) as saved:
        projection = Projection(torch.from_numpy(saved["matrix"]), torch.from_numpy(saved["offset"]))
        return projection, float(saved["variance"])


def _states(target: Target, shard: KeyShard, plan: dict[str, Any]) -> torch.Tensor:
    """[N, D]: the states that predicted the keyed tokens of a shard's parts."""
    found = embed(target, [ids.tolist() for ids in shard.ids], plan["feature"], plan["batch_positions"])
    keyed = [torch.from_numpy(keyed[1:]) for keyed in shard.keyed]
    return torch.cat([states_TD.cpu()[mask] for states_TD, mask in zip(found, keyed)])


def _pack(states_ND: torch.Tensor) -> np.ndarray:
    """bfloat16 is kept as 16-bit integers, since numpy has no such type."""
    if states_ND.dtype == torch.bfloat16:
        return states_ND.contiguous().view(torch.uint16).numpy()
    return states_ND.float().numpy()


def _unpack(packed: np.ndarray) -> torch.Tensor:
    states = torch.from_numpy(packed)
    return states.view(torch.bfloat16) if packed.dtype == np.uint16 else states


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
