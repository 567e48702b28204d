"""Building a DReSD store: what is a key, that a killed build goes on as if it had not been, and what is refused."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch

pytest.importorskip("faiss", reason="DReSD's stores need the extra `retrieval`")

from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.text.rendering import Rendered
from draftsmith.retrieval.dresd.build import build_store
from draftsmith.retrieval.dresd.embedding import embed
from draftsmith.retrieval.dresd.store import DresdStore, token_dtype
from draftsmith.retrieval.dresd.work import gather, shards


def corpus(documents: int = 60, seed: int = 1, vocab: int = 61) -> list[Rendered]:
    """Random conversations: a prompt that is given, an answer that is emitted."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(documents):
        given, emitted = int(generator.integers(1, 20)), int(generator.integers(1, 40))
        ids = generator.integers(3, vocab, given + emitted).tolist()
        made.append(Rendered(ids, [0] * given + [1] * emitted))
    return made


def files_of(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(store.iterdir()) if path.name != "store.json"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_key_i_is_the_state_that_predicted_token_i(make_model: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    target, samples = HFTarget(make_model("llama", dtype)), corpus()
    build_store(target, lambda: samples, tmp_path / "s", dims=16, shard_positions=200, fit_positions=500)
    store = DresdStore(tmp_path / "s")
    # What was emitted, and the token before it, unless nothing stands before that one.
    keyed_from = [max(sample.loss_mask.index(1) - 1, 1) for sample in samples]
    runs = [sample.token_ids[first:] for sample, first in zip(samples, keyed_from)]
    assert list(store.tokens) == [token for run in runs for token in run]
    assert list(np.diff([0, *store.ends])) == [len(run) for run in runs]
    at = 0
    for sample, first in zip(samples, keyed_from):
        # The target's own forward pass, with no cache and no padding.
        with torch.inference_mode():
            states_TD = target.model(torch.tensor([sample.token_ids]), output_hidden_states=True).hidden_states[-1][0]
        keys = store.project(states_TD[first - 1 : -1])
        stored = store.index.reconstruct_n(at, len(keys))
        tolerance = 1e-5 if dtype == torch.float64 else 0.02
        assert np.abs((keys * stored).sum(1) - 1).max() < tolerance
        at += len(keys)


def test_the_features_of_a_middle_layer_are_those_before_it(make_model: Any, tmp_path: Path) -> None:
    target = HFTarget(make_model("llama"))
    ids = corpus(1)[0].token_ids
    with torch.inference_mode():
        states = target.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(embed(target, [ids], "layer:1", 64)[0], states[1][0, :-1])
    with pytest.raises(ValueError, match="unknown feature"):
        build_store(target, corpus, tmp_path / "s", feature="layer:9")


def test_sequences_that_run_together_have_the_states_that_they_have_alone(make_model: Any) -> None:
    target = HFTarget(make_model("gemma2"))
    given = [sample.token_ids for sample in corpus(12)]
    together = embed(target, given, "last", 1_000)
    for ids, states_TD in zip(given, together):
        assert states_TD.shape[0] == len(ids) - 1
        torch.testing.assert_close(states_TD, embed(target, [ids], "last", 8)[0], rtol=1e-4, atol=1e-5)


def test_long_sequences_are_cut_with_context_and_no_key_is_lost() -> None:
    sample = Rendered(list(range(100)), [0] * 10 + [1] * 90)
    turns = Rendered(list(range(30)), [1, 1, 0, 0, *[1] * 20, *[0] * 6])
    found = gather([sample, turns, Rendered([], []), Rendered([4], [1])], 200, 40)
    assert list(found.tokens()) == [*range(9, 100), 1, *range(3, 24)]
    # A continuation may cross a cut, and no document; each run of emitted tokens is a document.
    assert list(found.ends) == [91, 92, 113]
    for part in range(len(found)):
        ids, keyed = found.ids(part), found.keyed(part)
        assert len(ids) <= 40
        assert not keyed[0]
    assert found.counts().sum() == 113


def test_shards_hold_every_part_once_and_the_first_are_a_random_sample() -> None:
    found = gather(corpus(400), 61, 64)
    groups = shards(found, 500, seed=3)
    assert sorted(np.concatenate(groups).tolist()) == list(range(400))
    assert max(found.counts()[group].sum() for group in groups) < 600
    assert 120 < np.mean(groups[0]) < 280
    assert [list(group) for group in groups] == [list(group) for group in shards(found, 500, seed=3)]


def test_ids_above_65535_are_kept() -> None:
    assert token_dtype(65_536).itemsize == 2
    assert token_dtype(65_537).itemsize == 4
    assert gather([Rendered([1, 128_000], [0, 1])], 128_256, 64).tokens().tolist() == [128_000]


def test_what_cannot_be_built_is_refused_with_one_line(make_model: Any, tmp_path: Path) -> None:
    target = HFTarget(make_model("llama"))
    for samples, options, line in (
        ([], {}, "no two tokens"),
        ([Rendered([4, 99], [0, 1])], {}, "sample 1 holds a token id outside"),
        (corpus(), {"index": "tree"}, "unknown index 'tree'"),
        (corpus(), {"index": "ivfpq"}, "an ivfpq index needs"),
        (corpus(), {"dims": 0}, "dims must be at least 1"),
    ):
        with pytest.raises(ValueError, match=line) as refused:
            build_store(target, lambda given=samples: given, tmp_path / line.split()[0], **options)
        assert "\n" not in str(refused.value)
        assert not (tmp_path / line.split()[0]).exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="already exists"):
        build_store(target, corpus, tmp_path / "there")


def test_an_interrupted_build_does_not_go_on_with_another_plan(make_model: Any, tmp_path: Path) -> None:
    target = HFTarget(make_model("llama"))
    with pytest.raises(RuntimeError, match="stopped"):
        build_store(target, corpus, tmp_path / "s", shard_positions=200, progress=_stop)
    with pytest.raises(ValueError, match="another dims"):
        build_store(target, corpus, tmp_path / "s", shard_positions=200, dims=8)
    with pytest.raises(ValueError, match="another source"):
        build_store(target, corpus, tmp_path / "s", shard_positions=200, source={"data": ["other"]})


def _stop(done: int, total: int) -> None:
    raise RuntimeError("stopped")


BUILD = """
import sys, time
import torch
torch.set_num_threads(1)
sys.path[:0] = sys.argv[1].split(":")
from tiny_models import tiny_model
from test_build import corpus
from pathlib import Path
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.retrieval.dresd.build import build_store
def progress(done, total):
    print(done, total, flush=True)
    time.sleep(float(sys.argv[3]))
build_store(HFTarget(tiny_model("llama")), lambda: corpus(), Path(sys.argv[2]), index="hnsw", dims=16,
            shard_positions=150, fit_positions=600, progress=progress)
"""


def test_a_build_that_is_killed_goes_on_and_ends_as_if_it_had_not_been(make_model: Any, tmp_path: Path) -> None:
    target = HFTarget(make_model("llama"))
    options: dict[str, Any] = {"index": "hnsw", "dims": 16, "shard_positions": 150, "fit_positions": 600}
    embedded: list[int] = []
    build_store(target, corpus, tmp_path / "whole", **options, progress=lambda done, _: embedded.append(done))
    killed = tmp_path / "killed"
    here = Path(__file__).parent
    # Once while the projection is being fitted, once after.
    for lines in (2, 4):
        process = processes.Started(BUILD, f"{here}:{here.parents[1] / 'infer'}", killed, "0.3")
        while process.stdout.count("\n") < lines:
            assert process.poll() is None, process.stderr
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
        assert not killed.exists()
        with pytest.raises(ValueError, match="its build was not finished"):
            DresdStore(killed)
    resumed: list[int] = []
    build_store(target, corpus, killed, **options, progress=lambda done, _: resumed.append(done))
    assert 0 < len(resumed) <= len(embedded) - 4
    assert files_of(killed) == files_of(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


def test_two_builds_of_one_store_do_not_mix(make_model: Any, tmp_path: Path) -> None:
    target = HFTarget(make_model("llama"))
    tried: list[str] = []

    def again(done: int, total: int) -> None:
        if not tried:
            with pytest.raises(ValueError, match="being written by another process") as refused:
                build_store(target, corpus, tmp_path / "s")
            tried.append(str(refused.value))

    build_store(target, corpus, tmp_path / "s", progress=again)
    assert tried
