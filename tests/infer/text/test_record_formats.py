"""Whatever a row of JSON holds, it is a record with something in it, or it is counted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftsmith.infer.text.record_formats import Unusable, parse

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


BY_TURN = {"turns": ["a", "b"], "outputs": ["c", "d"], "prompt_token_ids_by_turn": [[1], [1, 2, 3]],
           "token_ids_by_turn": [[2], [4, 5]]}  # fmt: skip


def test_token_ids_of_every_turn_are_kept_as_answers_writes_them():
    record = parse(BY_TURN, "f", 1, "x")
    assert (record.prompt_token_ids_by_turn, record.token_ids_by_turn) == ([[1], [1, 2, 3]], [[2], [4, 5]])
    assert record.answers == ["c", "d"]
    with_messages = parse(BY_TURN | {"messages": [{"role": "user", "content": "a"}]}, "f", 1, "x")
    assert with_messages.token_ids_by_turn == [[2], [4, 5]]


@pytest.mark.parametrize("ids", [[[2]], None, [[2], [-4]], [1, [2]], "2"])
@pytest.mark.parametrize("name", ["token_ids_by_turn", "prompt_token_ids_by_turn"])
def test_token_ids_by_turn_that_do_not_fit_make_a_row_unusable(name, ids):
    with pytest.raises(Unusable, match="token_ids_by_turn"):
        parse(BY_TURN | {name: ids}, "f", 1, "x")


@pytest.mark.parametrize("time", [1_700_000_000, 1_700_000_000_000, "1700000000", "2023-11-14T22:13:20Z",
                                  "2023-11-14 23:13:20+01:00"])  # fmt: skip
@pytest.mark.parametrize("name", ["created", "created_at", "timestamp", "tstamp", "time", "ts"])
def test_a_time_is_read_as_seconds_whatever_way_a_log_writes_it(name, time):
    assert parse({"text": "x", name: time}, "f", 1, "x").time == 1_700_000_000
    response = {"choices": [{"text": "y"}], name: time}
    assert parse({"request": {"prompt": "x"}, "response": response}, "f", 1, "x").time == 1_700_000_000
    assert parse({"text": "x", name: 12.5}, "f", 1, "x").time is None
