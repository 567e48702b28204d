"""Backward suffix arrays: every place that something follows, in the order of what precedes it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.retrieval.rest import suffix_array
from draftsmith.retrieval.rest.suffix_array import backward_suffixes
from draftsmith.retrieval.store.segments import join, separator, stream_dtype


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


def test_a_segment_too_long_to_sort_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suffix_array, "MOST_BYTES", 20)
    with pytest.raises(ValueError, match="at most 10"):
        backward_suffixes(np.arange(11, dtype=np.uint16), 65_535)
