"""Backward suffix arrays: every place that something follows, in the order of what precedes it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.retrieval.rest import suffix_array
from draftsmith.retrieval.rest.suffix_array import backward_suffixes
from draftsmith.retrieval.store.token_stream import check_ids, join, separator, stream_dtype


def sorted_by_hand(stream: list[int], separator: int) -> list[int]:
    places = [p for p in range(len(stream) - 1) if separator not in stream[p : p + 2]]
    return sorted(places, key=lambda p: stream[p::-1])


@pytest.mark.parametrize("vocab", [3, 255, 256, 65_535, 65_536, 200_000, 2**24 + 9])
@settings(deadline=None)
@given(data=st.data())
def test_the_order_is_that_of_the_reversed_prefixes(vocab: int, data: st.DataObject) -> None:
    ids = st.sampled_from(sorted({0, 1, 2, vocab // 2, vocab - 1}))
    documents = data.draw(st.lists(st.lists(ids, max_size=12), max_size=6))
    stream, _ = join([np.array(document, np.int64) for document in documents], stream_dtype(vocab))
    mark = separator(stream.dtype)
    assert backward_suffixes(stream, mark).tolist() == sorted_by_hand(stream.tolist(), mark)


def test_sixteen_bits_are_used_as_long_as_a_separator_fits_beside_the_ids() -> None:
    assert stream_dtype(65_535) == np.uint16
    assert stream_dtype(65_536) == np.uint32


def test_documents_stand_end_to_end_with_a_separator_behind_each() -> None:
    stream, starts = join([np.array([1, 2]), np.array([], int), np.array([3])], np.dtype(np.uint16))
    assert stream.tolist() == [1, 2, 65_535, 65_535, 3, 65_535]
    assert starts.tolist() == [0, 3, 4, 6]


def test_an_id_outside_the_vocabulary_is_refused_with_its_place() -> None:
    with pytest.raises(ValueError, match=r"logs\.jsonl row 7: token id 70000 is outside the vocabulary of 65536"):
        check_ids([5, 70_000], 65_536, "logs.jsonl row 7")


def test_a_segment_too_long_to_sort_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suffix_array, "MOST_BYTES", 20)
    with pytest.raises(ValueError, match="at most 10"):
        backward_suffixes(np.arange(11, dtype=np.uint16), 65_535)
