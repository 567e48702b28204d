"""Added documents: drafted from at once, bounded in memory, and as if they had been in the store."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.infer.contract.protocols import Budget
from draftsmith.retrieval.rest.in_memory_index import InMemoryIndex
from draftsmith.retrieval.rest.suffix_array import backward_suffixes

U2 = np.dtype(np.uint16)


def documents_of(index: InMemoryIndex) -> list[list[int]]:
    found: list[list[int]] = [[]]
    for token in np.concatenate([run.tokens for run in index.runs]).tolist():
        if token == 65_535:
            found.append([])
        else:
            found[-1].append(token)
    return found[:-1]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.integers(0, 9), max_size=20), min_size=1, max_size=40))
def test_runs_hold_every_document_once_in_order_and_are_sorted_as_segments_are(documents: list[list[int]]) -> None:
    index = InMemoryIndex(10, U2, 1_000_000)
    for document in documents:
        index.add_document(document)
    kept = [document for document in documents if document]
    assert not index.runs if not kept else documents_of(index) == kept
    for run in index.runs:
        assert run.suffixes.tolist() == backward_suffixes(run.tokens, 65_535).tolist()
    lengths = [len(run.tokens) for run in index.runs]
    assert all(2 * after <= before for before, after in itertools.pairwise(lengths))


def test_the_newest_documents_are_kept_within_the_bound_in_few_runs() -> None:
    index, rng, most = InMemoryIndex(1000, U2, 4000), np.random.default_rng(0), 0
    for number in range(2000):
        index.add_document([number % 1000, *rng.integers(0, 1000, rng.integers(1, 30)).tolist()])
        most = max(most, len(index))
        assert len(index.runs) <= 16 + math.log2(4000)
    assert 3000 < len(index) <= most <= 4000
    assert [document[0] for document in documents_of(index)][-5:] == [995, 996, 997, 998, 999]


def test_a_document_with_an_unknown_id_is_refused() -> None:
    with pytest.raises(ValueError, match="token id 10 is outside the vocabulary of 10"):
        InMemoryIndex(10, U2, 100).add_document([1, 10])
    with pytest.raises(ValueError, match="at least 8 tokens"):
        InMemoryIndex(10, U2, 0)


def test_added_documents_are_drafted_from_as_if_they_had_been_stored(tmp_path: Path, retrieval: Any) -> None:
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 12, rng.integers(1, 60)).tolist() for _ in range(60)]
    contexts = [rng.integers(0, 12, 20).tolist() for _ in range(20)]
    wide: dict[str, Any] = {"nodes": 4000, "num_draft_tokens": 3}
    whole = retrieval.bound(retrieval.write_store(tmp_path / "whole", documents), **wide)
    grown = retrieval.bound(retrieval.write_store(tmp_path / "half", documents[:30]), threads=2, **wide)
    for document in documents[30:]:
        grown.add_document(document)
    for ours, theirs in zip(*(retrieval.propose(one, contexts, Budget(4000, 3)) for one in (whole, grown))):
        confidences = []
        for draft in (ours, theirs):
            found = {trial.node: trial.confidence for trials in draft.trials.values() for trial in trials}
            confidences.append({tuple(path): found[i] for i, path in enumerate(retrieval.paths(draft))})
        assert len(ours) > 20
        assert confidences[0] == pytest.approx(confidences[1])
    # Binding it again starts from the store alone.
    grown.bind(type("Target", (), {"tokenizer": None, "vocab_size": 100, "model": None})())
    assert grown.holds(documents[0])
    assert not grown.holds([*documents[45], *documents[46]])


def test_an_added_document_is_found_at_once_and_its_end_is_not_crossed(tmp_path: Path, retrieval: Any) -> None:
    drafter = retrieval.bound(retrieval.write_store(tmp_path / "s", [[1, 2, 3]]))
    assert len(retrieval.propose(drafter, [[50]])[0]) == 0
    drafter.add_document([50, 51])
    drafter.add_document([52, 53])
    (first, second, stored) = retrieval.propose(drafter, [[50], [51], [2]])
    assert (first.tokens, len(second), stored.tokens) == ([51], 0, [3])
