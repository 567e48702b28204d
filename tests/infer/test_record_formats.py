"""Whatever a row of JSON holds, it is a record with something in it, or it is counted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from draftsmith.infer.record_formats import Unusable, parse

FIELDS = ["messages", "role", "content", "request", "response", "choices", "message", "prompt", "output", "turns"]
FIELDS += ["outputs", "text", "conversations", "instruction", "input", "token_ids", "question_id", "time", "body"]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)


def nest(inner):
    return st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4)


@given(row=st.recursive(LEAVES, nest, max_leaves=12))
def test_any_json_row_is_a_record_with_something_in_it_or_is_counted(row):
    try:
        record = parse(row, "file", 1, "file-1")
    except Unusable:
        return
    assert record.questions or record.answers or record.documents or record.token_ids


@given(log=st.fixed_dictionaries({"request": st.just({"prompt": "hi"}), "response": st.recursive(LEAVES, nest)}))
def test_any_response_in_a_log_is_read_or_is_counted(log):
    try:
        record = parse(log, "file", 1, "file-1")
    except Unusable:
        return
    assert record.questions == ["hi"]
