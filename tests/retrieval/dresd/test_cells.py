"""Compressed cells that are filled range by range, against those that one process fills at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("faiss", reason="DReSD's stores need the extra `retrieval`")

import faiss

from draftsmith.infer.files.workers import InProcess
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.text.rendering import Rendered
from draftsmith.recipes.cli.main import run
from draftsmith.retrieval.dresd import cells
from draftsmith.retrieval.dresd.build import build_store
from draftsmith.retrieval.dresd.cells import build_cells, key_ranges
from draftsmith.retrieval.dresd.index import Lists, lists_of, make_index, read_index, search, set_effort, write_index
from draftsmith.retrieval.dresd.store import DresdStore
from draftsmith.retrieval.dresd.work import ALL_KEYS, BuildFolder

DIMS = 8


def spread_keys(count: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    keys = generator.normal(size=(count, DIMS)) / np.arange(1, DIMS + 1) ** 0.5
    return (keys / np.linalg.norm(keys, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def keys() -> np.ndarray:
    return spread_keys(11_000)


@pytest.fixture(scope="module")
def at_once(keys: np.ndarray) -> Any:
    return make_index("ivfpq", keys, seed=4)


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "SMALLEST_RANGE", 3_000)
    monkeypatch.setattr(cells, "BLOCK", 1_700)


def fill(folder: Path, keys: np.ndarray, lists: Lists, progress: Callable[[int, int], None] | None = None) -> Path:
    (folder / "work").mkdir(parents=True, exist_ok=True)
    np.save(folder / "work" / ALL_KEYS, keys)
    build_cells(BuildFolder(folder / "work"), keys, 4, InProcess(), folder / "index.faiss", lists, progress)
    return folder / "index.faiss"


def found(index: Any, keys: np.ndarray) -> list[np.ndarray]:
    set_effort(index, 0)
    return list(search(index, spread_keys(200, seed=9), 20))


@pytest.mark.usefixtures("small_ranges")
def test_ranges_make_the_same_index_as_all_keys_at_once(tmp_path: Path, keys: np.ndarray, at_once: Any) -> None:
    assert len(key_ranges(len(keys))) == 4
    made = fill(tmp_path, keys, "memory")
    write_index(at_once, tmp_path / "wanted")
    again = faiss.read_index(str(made))
    set_effort(again, 0)
    write_index(again, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "wanted").read_bytes()
    for ours, wanted in zip(found(read_index(made), keys), found(at_once, keys)):
        assert np.array_equal(ours, wanted)


@pytest.mark.usefixtures("small_ranges")
def test_lists_on_disk_find_the_same_wherever_the_folder_is(tmp_path: Path, keys: np.ndarray, at_once: Any) -> None:
    fill(tmp_path / "a", keys, "disk")
    made = fill(tmp_path / "b", keys, "disk")
    assert made.read_bytes() == (tmp_path / "a" / made.name).read_bytes()
    assert lists_of(made).read_bytes() == lists_of(tmp_path / "a" / made.name).read_bytes()
    assert made.stat().st_size < 0.5 * lists_of(made).stat().st_size
    (tmp_path / "b").rename(tmp_path / "moved")
    index = read_index(tmp_path / "moved" / made.name)
    assert isinstance(faiss.downcast_InvertedLists(index.invlists), faiss.OnDiskInvertedLists)
    for ours, wanted in zip(found(index, keys), found(at_once, keys)):
        assert np.array_equal(ours, wanted)


@pytest.mark.usefixtures("small_ranges")
@pytest.mark.parametrize("fault", ["order", "lost"])
def test_ranges_in_another_order_or_a_lost_one_are_noticed(
    tmp_path: Path, keys: np.ndarray, at_once: Any, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Planted: what the two tests above compare is not the same by itself."""
    merged = cells._merged
    changed = {"order": slice(None, None, -1), "lost": slice(1, None)}[fault]
    monkeypatch.setattr(cells, "_merged", lambda work, ranges, *more: merged(work, ranges[changed], *more))
    made = fill(tmp_path, keys, "memory")
    write_index(at_once, tmp_path / "wanted")
    again = faiss.read_index(str(made))
    set_effort(again, 0)
    write_index(again, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() != (tmp_path / "wanted").read_bytes()
    if fault == "lost":
        assert not np.array_equal(found(again, keys)[1], found(at_once, keys)[1])


@pytest.mark.usefixtures("small_ranges")
def test_a_stopped_build_keeps_its_ranges_and_ends_with_the_same_bytes(tmp_path: Path, keys: np.ndarray) -> None:
    whole = fill(tmp_path / "whole", keys, "memory").read_bytes()
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done > 6_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "stopped", keys, "memory", stop)
    assert seen[-1] == (7_700, 11_000)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "stopped" / "work").glob("*.faiss")}
    assert sorted(kept) == ["cells-00000.faiss", "cells-00001.faiss", "trained.faiss"]
    seen.clear()
    made = fill(tmp_path / "stopped", keys, "memory", lambda done, total: seen.append((done, total)))
    assert seen == [(7_700, 11_000), (9_000, 11_000), (10_700, 11_000), (11_000, 11_000)]
    assert made.read_bytes() == whole
    assert all((tmp_path / "stopped" / "work" / name).stat().st_mtime_ns == then for name, then in kept.items())


def counting(documents: int) -> list[Rendered]:
    generator = np.random.default_rng(2)
    return [Rendered(generator.integers(3, 61, 60).tolist(), [0] * 4 + [1] * 56) for _ in range(documents)]


def test_a_store_drafts_the_same_from_memory_and_from_disk(
    make_model: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target, samples = HFTarget(make_model("llama")), counting(190)
    filled: list[tuple[int, int]] = []
    for lists in ("memory", "disk"):
        build_store(
            target, lambda: samples, tmp_path / lists, index="ivfpq", dims=DIMS, lists=lists,
            filled=lambda *done: filled.append(done),
        )  # fmt: skip
    stores = [DresdStore(tmp_path / lists) for lists in ("memory", "disk")]
    assert capfd.readouterr() == ("", "")
    assert filled == [(len(stores[0]), len(stores[0]))] * 2
    queries = spread_keys(50, seed=3)
    (sims, offsets), (other_sims, other_offsets) = (store.search(queries, 10) for store in stores)
    assert np.array_equal(sims, other_sims)
    assert np.array_equal(offsets, other_offsets)
    assert len(np.unique(offsets)) > 50
    one, two = (store.manifest for store in stores)
    assert one["calibration"] == two["calibration"]
    assert set(two["parts"]) == {*one["parts"], "lists"}
    assert not (tmp_path / "memory" / "index.lists").exists()
    (tmp_path / "disk" / "index.lists").unlink()
    with pytest.raises(ValueError, match=r"index\.lists") as refused:
        DresdStore(tmp_path / "disk")
    assert "\n" not in str(refused.value)


def test_too_few_keys_are_refused_before_any_is_embedded(make_model: Any, tmp_path: Path) -> None:
    target = HFTarget(make_model("llama"))

    def embedded(done: int, total: int) -> None:
        raise ValueError("shown")

    for samples, options, line in (
        (counting(20), {}, "needs 9984 keys for training, and there are 11"),
        (counting(190), {"dims": 7}, "an even number of key dimensions, not 7"),
        (counting(190), {"index": "flat"}, "shown"),  # what was refused leaves nothing that has to be deleted first
    ):
        with pytest.raises(ValueError, match=line):
            build_store(
                target, lambda given=samples: given, tmp_path / "s", **{"index": "ivfpq", **options}, progress=embedded
            )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--lists", "disk"], "lists on disk are those of an ivfpq index, and the index is auto: add --index ivfpq"),
        (["--lists", "disk", "--index", "hnsw"], "and the index is hnsw: add --index ivfpq"),
        (["--lists", "tape"], "lists"),
    ],
)
def test_lists_that_cannot_be_had_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    asked = ["store", "build", "dresd", "--target", "T", "--data", "D", "--out", str(tmp_path / "s"), *words]
    assert run(asked) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert re.search(re.escape(line), said[0])
