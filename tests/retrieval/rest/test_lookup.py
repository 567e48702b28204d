"""Whether a text stands in a store word for word: as a plain search over every document tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TOKEN = st.integers(0, 2)


def stands(documents: list[list[int]], ids: list[int]) -> bool:
    return any(d[i : i + len(ids)] == ids for d in documents for i in range(len(d) - len(ids) + 1))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(
    documents=st.lists(st.lists(TOKEN, max_size=12), min_size=1, max_size=6).filter(lambda ds: any(map(len, ds))),
    texts=st.lists(st.lists(TOKEN, min_size=1, max_size=6), min_size=1, max_size=20),
    chunk=st.integers(1, 30),
)
def test_a_text_is_held_where_it_stands_in_one_document(
    tmp_path_factory: pytest.TempPathFactory,
    retrieval: Any,
    documents: list[list[int]],
    texts: list[list[int]],
    chunk: int,
) -> None:
    store = retrieval.write_store(tmp_path_factory.mktemp("s") / "store", documents, chunk=chunk)
    drafter = retrieval.bound(store)
    for text in [*texts, *(document for document in documents if document)]:
        assert drafter.holds(text) == stands(documents, text), text


def test_documents_and_their_ends_are_held_and_what_crosses_them_is_not(tmp_path: Path, retrieval: Any) -> None:
    drafter = retrieval.bound(retrieval.write_store(tmp_path / "s", [[1, 2, 3, 4], [5], [6, 7]]))
    assert [drafter.holds(ids) for ids in ([1, 2, 3, 4], [3, 4], [4], [5], [6, 7])] == [True] * 5
    assert [drafter.holds(ids) for ids in ([4, 5], [4, 6], [2, 4], [8], [65_535], [], [1, 2, 3, 4, 5])] == [False] * 7
