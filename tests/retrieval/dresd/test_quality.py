"""A DReSD store's measures against values by hand, its indexes against exact search, its calibration against counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("faiss", reason="DReSD's stores need the extra `retrieval`")

from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.text.rendering import Rendered
from draftsmith.retrieval.dresd.build import build_store
from draftsmith.retrieval.dresd.calibration import SimilarityCalibration, calibrate, fit_curve
from draftsmith.retrieval.dresd.index import choose, make_index, read_index, search, stored_keys, write_index
from draftsmith.retrieval.dresd.projection import Projection, fit
from draftsmith.retrieval.dresd.quality import held_out_recall, hold_out, index_recall, self_recall
from draftsmith.retrieval.dresd.store import DresdStore


def realistic_keys(count: int, seed: int = 0, dims: int = 64) -> np.ndarray:
    """Keys as targets have them: clusters in few directions of falling variance, of length one."""
    generator = np.random.default_rng(seed)
    spread = 1 / np.arange(1, dims + 1) ** 0.7
    centres = generator.normal(size=(count // 20, dims)) * spread
    keys = centres[generator.integers(0, len(centres), count)] + 0.4 * generator.normal(size=(count, dims)) * spread
    return (keys / np.linalg.norm(keys, axis=1, keepdims=True)).astype(np.float32)


def cyclic(documents: int, seed: int) -> list[Rendered]:
    """Documents that count upwards from anywhere, so that what follows a token is certain."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(documents):
        first, length = int(generator.integers(0, 50)), int(generator.integers(12, 40))
        made.append(Rendered([3 + (first + i) % 50 for i in range(length)], [0] * 4 + [1] * (length - 4)))
    return made


def test_hnsw_finds_19_of_20_of_the_exact_neighbours() -> None:
    keys = realistic_keys(6_000)
    found = index_recall(keys[:-500], keys[-500:], "hnsw")
    assert found["recall@10"] >= 0.95
    assert found["keys"] == 5_500


def test_compressed_cells_are_built_from_enough_keys_and_search() -> None:
    keys = realistic_keys(10_400, dims=8)
    index = make_index("ivfpq", keys[:-200])
    _, offsets = search(index, keys[-200:], 10)
    assert index.ntotal == 10_200
    exact = search(make_index("flat", keys[:-200]), keys[-200:], 10)[1]
    shared = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(offsets.tolist(), exact.tolist())])
    assert shared > 0.3


def test_the_same_keys_make_the_same_index_and_read_back_equal(tmp_path: Path) -> None:
    keys = realistic_keys(3_000)
    for name in ("a", "b"):
        write_index(make_index("hnsw", keys), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    index = read_index(tmp_path / "a")
    assert np.array_equal(stored_keys(index, np.array([0, 7, 2_999])), keys[[0, 7, 2_999]])
    (tmp_path / "a").write_bytes(b"nothing that FAISS wrote")
    with pytest.raises(ValueError, match="FAISS cannot read it"):
        read_index(tmp_path / "a")


def test_equal_similarities_come_in_the_order_of_their_offsets() -> None:
    keys = np.repeat(realistic_keys(40), 5, axis=0)
    _, offsets = search(make_index("flat", keys), keys[:5], 5)
    assert offsets.tolist() == [[0, 1, 2, 3, 4]] * 5


def test_auto_is_exact_for_small_stores_and_compressed_for_the_largest() -> None:
    assert [choose("auto", keys) for keys in (10, 20_001, 50_000_000)] == ["flat", "hnsw", "ivfpq"]
    assert choose("ivfpq", 3) == "ivfpq"


def test_the_projection_is_z_score_then_pca_then_length_one() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(400, 12, generator=generator, dtype=torch.float64) * torch.arange(1.0, 13.0) + 100
    states[:, 3] = states[:, 2] * 2
    states[:, 5] = 7.0
    projection, held = fit([states[:150], states[150:]], 4)
    scaled = (states - states.mean(0)) / states.std(0, unbiased=False).clamp_min(1e-9)
    scaled[:, 5] = 0
    _, singular, directions = torch.linalg.svd(scaled, full_matrices=False)
    wanted = torch.nn.functional.normalize(scaled @ directions[:4].T, dim=-1)
    found = torch.from_numpy(projection.keys(states)).double()
    # A direction may come out with either sign; what is compared with it does not care.
    torch.testing.assert_close(found @ found.T, wanted @ wanted.T, atol=1e-4, rtol=0)
    assert held == pytest.approx(float((singular[:4] ** 2).sum() / (singular**2).sum()), abs=1e-6)
    with pytest.raises(ValueError, match="cannot be fitted on 1"):
        fit([states[:1]], 4)


def test_a_projection_reads_back_as_it_was_written(tmp_path: Path) -> None:
    states = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    projection, _ = fit([states], 5)
    projection.write(tmp_path / "projection.bin")
    assert np.array_equal(Projection.read(tmp_path / "projection.bin", 8).keys(states), projection.keys(states))
    with pytest.raises(ValueError, match="no map of 9-wide states"):
        Projection.read(tmp_path / "projection.bin", 9)


def test_a_curve_rises_and_gives_back_the_probability_that_made_it() -> None:
    generator = np.random.default_rng(0)
    similarity = generator.uniform(0, 1, 20_000)
    curve = fit_curve(similarity, generator.uniform(size=20_000) < similarity**2)
    grid = np.linspace(0.1, 0.95, 30)
    assert np.abs(curve(grid) - grid**2).max() < 0.05
    assert list(curve.probability) == sorted(curve.probability)
    assert fit_curve([], [])(np.array([0.3])).tolist() == [0.5]
    again = SimilarityCalibration.from_json(SimilarityCalibration(curve, curve, (3, 4)).to_json())
    assert again == SimilarityCalibration(curve, curve, (3, 4))


def test_calibration_leaves_the_own_document_out() -> None:
    # Two documents of opposite keys, each a copy of itself only: without itself nothing near is left, and the far
    # document goes on otherwise.
    keys = np.concatenate([np.tile([1.0, 0.0], (30, 1)), np.tile([-1.0, 0.0], (30, 1))]).astype(np.float32)
    tokens = np.array([5, 6] * 15 + [5, 7] * 15, dtype=np.uint16)
    found = calibrate(make_index("flat", keys), keys, tokens, np.array([30, 60], dtype=np.uint64), seed=0)
    assert found.observations[0] > 0
    assert max(found.first.similarity) <= -0.99
    # 5 is followed by 6 in one and 7 in the other: never right.
    assert max(found.first.probability) < 0.1


@pytest.fixture(scope="module")
def counting(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[HFTarget, DresdStore]:
    target = HFTarget(make_model("llama"))
    out = tmp_path_factory.mktemp("counting") / "store"
    build_store(target, lambda: cyclic(150, 0), out, dims=24)
    return target, DresdStore(out)


def test_held_out_recall_is_that_of_a_count_by_hand(counting: tuple[HFTarget, DresdStore]) -> None:
    target, store = counting
    text = hold_out(store, target, cyclic(6, 1))
    found = held_out_recall(store, text)
    tokens = [int(token) for token in store.tokens]
    best = 0
    for key, token, followed in zip(text.keys_NK, text.tokens, text.followed):
        keys = store.index.reconstruct_n(0, len(store))
        order = np.argsort(-(keys @ key), kind="stable")[:50]
        drafts = [store.continuation(int(i), 4) for i in order if tokens[i] == token]
        best += bool(drafts) and drafts[0][:1] == followed[:1]
    assert found["best"]["1"] == pytest.approx(best / len(text), abs=0.02)
    assert found["positions"] == len(text)
    # What follows a token is certain in this text, so a draft is wrong only where a stored document ends.
    assert found["any"]["1"] >= found["with_a_draft"] - 0.1
    assert found["any"]["4"] > 0.5


def test_a_stored_key_finds_itself(counting: tuple[HFTarget, DresdStore]) -> None:
    assert self_recall(counting[1], sample=200) == pytest.approx(1.0)


def test_similar_neighbours_are_more_often_right(counting: tuple[HFTarget, DresdStore]) -> None:
    calibration = counting[1].calibration
    assert min(calibration.observations) > 500
    assert calibration.first(np.array([1.0]))[0] > 0.8
