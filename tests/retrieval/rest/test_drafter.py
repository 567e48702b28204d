"""REST: every draft occurs in the store or in the row, and the best of the candidates are drafted."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from draftsmith.infer.contract.draft import ROOT
from draftsmith.infer.contract.protocols import Budget
from draftsmith.infer.contract.row import Row
from draftsmith.infer.models.recorded_target import RecordedTarget
from draftsmith.retrieval import Rest

TOKEN = st.integers(0, 5)
DOCUMENTS = st.lists(st.lists(TOKEN, max_size=30), min_size=1, max_size=8)


def contains(document: list[int], context: list[int], path: list[int]) -> bool:
    """`path` follows the newest token of the context somewhere in `document`."""
    wanted = [context[-1], *path]
    return any(document[i : i + len(wanted)] == wanted for i in range(len(document)))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(documents=DOCUMENTS.filter(lambda ds: any(map(len, ds))), context=st.lists(TOKEN, min_size=1, max_size=20),
       chunk=st.integers(1, 60), nodes=st.integers(1, 40), depth=st.integers(1, 9), per_level=st.integers(1, 6),
       weight=st.sampled_from([0.0, 2.0]))  # fmt: skip
def test_every_path_follows_the_newest_token_within_one_document_or_in_the_row(
    tmp_path_factory: pytest.TempPathFactory, retrieval: Any, documents: list[list[int]], context: list[int],
    chunk: int, nodes: int, depth: int, per_level: int, weight: float,
) -> None:  # fmt: skip
    store = retrieval.write_store(tmp_path_factory.mktemp("s") / "store", documents, chunk=chunk)
    drafter = retrieval.bound(store, nodes=nodes, hits_per_level=per_level, hits=12, context_weight=weight)
    (draft,) = retrieval.propose(drafter, [context], Budget(64, depth))
    draft.check(100)
    texts = documents + ([context] if weight else [])
    for path in retrieval.paths(draft):
        assert any(contains(text, context, path) for text in texts), path
    assert len(draft) <= nodes
    assert draft.depth <= depth
    assert len({tuple(path) for path in retrieval.paths(draft)}) == len(draft)
    followed = any(contains(text, context, []) and contains(text[:-1], context, []) for text in texts)
    assert bool(len(draft)) == followed
    siblings = list(draft.trials.values())
    assert all([t.confidence for t in trials] == sorted((t.confidence for t in trials), reverse=True)
               for trials in siblings)  # fmt: skip
    assert all(0 < trial.confidence <= 1 for trials in siblings for trial in trials)


def test_nothing_is_drafted_when_nothing_is_found(tmp_path: Path, retrieval: Any) -> None:
    drafter = retrieval.bound(retrieval.write_store(tmp_path / "s", [[1, 2, 3]]))
    assert [len(d) for d in retrieval.propose(drafter, [[7], [3], [7, 8, 9]])] == [0, 0, 0]


def test_a_store_of_one_token_has_nothing_to_draft_but_the_row_has(tmp_path: Path, retrieval: Any) -> None:
    drafter = retrieval.bound(retrieval.write_store(tmp_path / "s", [[1]]))
    first, second = retrieval.propose(drafter, [[1], [1, 2, 1]])
    assert len(first) == 0
    assert second.tokens == [2, 1]


def test_neither_match_nor_continuation_crosses_documents(tmp_path: Path, retrieval: Any) -> None:
    drafter = retrieval.bound(retrieval.write_store(tmp_path / "s", [[1, 2], [3, 4], [], [2, 5]]))
    (across,) = retrieval.propose(drafter, [[2, 3]])
    assert retrieval.paths(across) == [[4]]
    (end,) = retrieval.propose(drafter, [[1, 2]])
    assert retrieval.paths(end) == [[5]]


def test_the_longer_match_is_tried_first_and_the_shorter_ones_stay_in_the_tree(tmp_path: Path, retrieval: Any) -> None:
    documents = [[9, 1, 2, 3, 10]] * 3 + [[8, 3, 11]] * 5
    drafter = retrieval.bound(retrieval.write_store(tmp_path / "s", documents))
    (draft,) = retrieval.propose(drafter, [[1, 2, 3]])
    assert [draft.tokens[trial.node] for trial in draft.trials[ROOT]] == [10, 11]


def test_the_rows_own_text_is_in_the_same_tree_and_outweighs_a_place_of_the_store(
    tmp_path: Path, retrieval: Any
) -> None:
    store = retrieval.write_store(tmp_path / "s", [[4, 3, 11]])
    (draft,) = retrieval.propose(retrieval.bound(store), [[3, 12, 5, 3]])
    assert [draft.tokens[trial.node] for trial in draft.trials[ROOT]] == [12, 11]
    (without,) = retrieval.propose(retrieval.bound(store, context_weight=0.0), [[3, 12, 5, 3]])
    assert without.tokens == [11]


def test_the_budget_is_used_up_and_deep_nodes_are_in_it(tmp_path: Path, retrieval: Any) -> None:
    documents = [[1, 10 * i + 10, *range(10 * i + 11, 10 * i + 20)] for i in range(5)]
    (draft,) = retrieval.propose(retrieval.bound(retrieval.write_store(tmp_path / "s", documents)), [[1]])
    assert len(draft) == 50
    assert draft.depth == 10
    (small,) = retrieval.propose(retrieval.bound(tmp_path / "s", nodes=20), [[1]])
    assert len(small) == 20


def test_ids_beyond_sixteen_bits_come_back_as_they_are(tmp_path: Path, retrieval: Any) -> None:
    store = retrieval.write_store(tmp_path / "s", [[70_000, 65_535, 65_536, 131_072, 0]], vocab=200_000)
    (draft,) = retrieval.propose(retrieval.bound(store, 200_000), [[70_000]])
    assert draft.tokens == [65_535, 65_536, 131_072, 0]


def test_a_targets_padded_ids_never_match_the_separator(tmp_path: Path, retrieval: Any) -> None:
    drafter = retrieval.bound(retrieval.write_store(tmp_path / "s", [[1, 2], [3, 4]]), 70_000)
    assert [len(d) for d in retrieval.propose(drafter, [[65_535]])] == [0]


def test_sampling_many_places_is_unbiased(tmp_path: Path, retrieval: Any) -> None:
    """A token that follows 1 place in 5, whatever its id: its weight in the sample is near that, over many contexts."""
    rng = np.random.default_rng(0)
    documents = [[int(rng.integers(50, 100)), 1, 2 if rng.random() < 0.2 else int(rng.integers(3, 40))]
                 for _ in range(4000)]  # fmt: skip
    share = sum(document[2] == 2 for document in documents) / len(documents)
    drafter = retrieval.bound(retrieval.write_store(tmp_path / "s", documents), hits_per_level=50, hits=50)
    sampled = []
    for before in range(40):
        row = Row("r", [before % 40, before, 45, 1])
        drafter.open([row])
        drafter.propose([row], [Budget(1, 1)])
        scratch, count = drafter._scratches[0], 50
        assert scratch.weights_H[:count].sum() == pytest.approx(4000)
        sampled.append((scratch.weights_H[:count] * (scratch.ahead_HD[:count, 0] == 2)).sum() / 4000)
    assert len(set(sampled)) > 5
    assert np.mean(sampled) == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 50 / 40))


def test_duplicates_add_weight_and_no_nodes(tmp_path: Path, retrieval: Any) -> None:
    once = retrieval.write_store(tmp_path / "a", [[1, 2, 3]])
    often = retrieval.write_store(tmp_path / "b", [[1, 2, 3]] * 20)
    (few,), (many,) = (retrieval.propose(retrieval.bound(store), [[1]]) for store in (once, often))
    assert few.tokens == many.tokens == [2, 3]
    assert many.trials[ROOT][0].confidence > few.trials[ROOT][0].confidence


def random_documents(seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 12, rng.integers(1, 60)).tolist() for _ in range(60)]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_drafts_what_each_row_would_alone(tmp_path: Path, retrieval: Any, threads: int) -> None:
    drafter = retrieval.bound(retrieval.write_store(tmp_path / "s", random_documents(), chunk=300), threads=threads)
    contexts = random_documents(1)[:8]
    together = retrieval.propose(drafter, contexts)
    alone = [retrieval.propose(drafter, [context])[0] for context in contexts]
    assert [d.tokens for d in together] == [d.tokens for d in alone]
    assert [d.trials for d in together] == [d.trials for d in alone]
    assert sum(map(len, together)) > 100


def test_segments_are_one_store(tmp_path: Path, retrieval: Any) -> None:
    documents = random_documents()
    wide = {"nodes": 4000, "num_draft_tokens": 3}
    whole = retrieval.bound(retrieval.write_store(tmp_path / "one", documents), **wide)
    parted = retrieval.bound(retrieval.write_store(tmp_path / "many", documents, chunk=100), **wide)
    assert len(parted._mapped) > 10
    contexts = random_documents(2)
    for drafts in zip(*(retrieval.propose(drafter, contexts, Budget(4000, 3)) for drafter in (whole, parted))):
        ours, theirs = ({tuple(path): draft.trials[draft.parents[i]] for i, path in enumerate(retrieval.paths(draft))}
                        for draft in drafts)  # fmt: skip
        assert ours.keys() == theirs.keys()
        for path, trials in ours.items():
            confidences = [trial.confidence for trial in trials]
            assert confidences == pytest.approx([trial.confidence for trial in theirs[path]])


def test_a_row_may_grow_by_any_number_of_tokens(tmp_path: Path, retrieval: Any) -> None:
    drafter = retrieval.bound(retrieval.write_store(tmp_path / "s", random_documents()))
    ids = np.random.default_rng(3).integers(0, 12, 1500).tolist()
    row = Row("grown", ids[:3])
    drafter.open([row])
    for end in (4, 9, 40, 41, 700, 1500):
        row.ids = ids[:end]
        (grown,) = drafter.propose([row], [Budget(64, 64)])
        (fresh,) = retrieval.propose(drafter, [ids[:end]])
        assert (grown.tokens, grown.parents) == (fresh.tokens, fresh.parents)


PROBE = """
import json, sys
from draftsmith.infer.contract.protocols import Budget
from draftsmith.infer.models.recorded_target import RecordedTarget
from draftsmith.infer.contract.row import Row
from draftsmith.retrieval import Rest
drafter = Rest(sys.argv[1], hits_per_level=5)
drafter.bind(RecordedTarget({}, 100))
rows = [Row(str(i), ids) for i, ids in enumerate(json.loads(sys.argv[2]))]
drafter.open(rows)
drafts = drafter.propose(rows, [Budget(64, 64)] * len(rows))
print(json.dumps([[d.tokens, d.parents, [t.confidence for ts in d.trials.values() for t in ts]] for d in drafts]))
"""


def test_two_processes_propose_identical_trees(tmp_path: Path, retrieval: Any) -> None:
    store = retrieval.write_store(tmp_path / "s", random_documents(), chunk=500)
    contexts = json.dumps(random_documents(4))
    told = [
        subprocess.run([sys.executable, "-c", PROBE, str(store), contexts], capture_output=True, text=True,
                       timeout=300, env={"PYTHONHASHSEED": str(seed), "HF_HUB_OFFLINE": "1"})
        for seed in (1, 2)
    ]  # fmt: skip
    assert told[0].returncode == 0, told[0].stderr
    assert told[0].stdout == told[1].stdout
    assert sum(len(tokens) for tokens, _, _ in json.loads(told[0].stdout)) > 1000


STATM = Path("/proc/self/statm")


def mapped_mb() -> float:
    """MB of mapped files that are in this process's memory now."""
    return int(STATM.read_text().split()[2]) * mmap.PAGESIZE / 2**20


@pytest.mark.skipif(not STATM.exists(), reason="what is resident is told by Linux alone")
def test_a_store_that_is_not_mapped_gives_the_same_drafts_and_holds_no_memory(tmp_path: Path, retrieval: Any) -> None:
    rng = np.random.default_rng(5)
    documents = rng.integers(0, 1000, (1000, 1000)).tolist()
    store = retrieval.write_store(tmp_path / "s", documents, vocab=1000)
    contexts = [[token] for token in range(1000)]
    filed = retrieval.bound(store, 1000, nodes=4, max_mapped_mb=4, cache_mb=0.25)
    assert filed._store.manifest.bytes > 5 * 2**20
    retrieval.propose(filed, contexts[:1])
    empty = mapped_mb()
    read = [draft.tokens for draft in retrieval.propose(filed, contexts)]
    assert mapped_mb() < empty + 0.5
    mapped = retrieval.bound(store, 1000, nodes=4, max_mapped_mb=16)
    assert read == [draft.tokens for draft in retrieval.propose(mapped, contexts)]
    assert mapped_mb() > empty + 3
    assert len(set(map(tuple, read))) > 900


def test_drafts_of_a_store_that_is_not_mapped_outlive_its_files_and_see_that_one_was_cut(
    tmp_path: Path, retrieval: Any
) -> None:
    store = retrieval.write_store(tmp_path / "s", [[1, 2, 3, 4, 5] * 40] * 100, vocab=100)
    filed = retrieval.bound(store, 100, nodes=4, max_mapped_mb=0, cache_mb=0.01)
    wanted = [draft.tokens for draft in retrieval.propose(filed, [[2], [4, 5]])]
    assert (wanted[0][0], wanted[1][0]) == (3, 1)
    for file in store.iterdir():
        file.rename(tmp_path / file.name)
    assert [draft.tokens for draft in retrieval.propose(filed, [[2], [4, 5]])] == wanted
    os.truncate(next(tmp_path.glob("*.suffixes")), 8)
    with pytest.raises(ValueError, match="become shorter"):
        retrieval.propose(filed, [[2]])


def test_a_store_for_more_ids_than_the_target_has_is_refused(tmp_path: Path, retrieval: Any) -> None:
    store = retrieval.write_store(tmp_path / "s", [[1, 2]], vocab=100)
    with pytest.raises(ValueError, match="built for 100 token ids; the target has 50"):
        retrieval.bound(store, 50)


def test_another_tokenizer_is_refused(tmp_path: Path, retrieval: Any, word_tokenizer: Path) -> None:
    from draftsmith.infer.text.templates import load_tokenizer

    drafter = Rest(str(retrieval.write_store(tmp_path / "s", [[1, 2]])))
    with pytest.raises(ValueError, match="built with another tokenizer"):
        drafter.bind(RecordedTarget({}, 300, load_tokenizer(word_tokenizer)))


def test_without_numba_one_line_names_the_extra(
    tmp_path: Path, retrieval: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = retrieval.write_store(tmp_path / "s", [[1, 2]])
    import draftsmith.retrieval.rest

    for name in ("lookup", "tree", "stream_access"):
        monkeypatch.delitem(sys.modules, f"draftsmith.retrieval.rest.{name}", raising=False)
        monkeypatch.delattr(draftsmith.retrieval.rest, name, raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(ValueError, match=r"needs numba.*draftsmith\[retrieval\]"):
        retrieval.bound(store)


@pytest.mark.parametrize("documents", [[[1], [2, 3]], [[1, 2, 3]]])
def test_everything_is_compiled_when_bound(tmp_path: Path, retrieval: Any, documents: list[list[int]]) -> None:
    drafter = retrieval.bound(retrieval.write_store(tmp_path / "s", documents))
    kernels = [drafter._lookup.narrow, drafter._lookup.plan, drafter._lookup.gather, drafter._lookup.index_row,
               drafter._lookup.gather_row, drafter._tree.grow]  # fmt: skip
    compiled = [len(kernel.signatures) for kernel in kernels]
    assert all(compiled)
    retrieval.propose(drafter, [[2], [2, 3, 2], [9] * 300])
    assert [len(kernel.signatures) for kernel in kernels] == compiled


@pytest.mark.parametrize("wrong", [{"nodes": 0}, {"max_match": 0}, {"threads": 0}, {"context_weight": -1.0}])
def test_senseless_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Rest("store", **wrong)
