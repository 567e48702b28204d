"""Recorded answers in two parts, and answers that stand in both."""

import pytest

from draftsmith.infer.measure.leakage import leakage, said
from draftsmith.infer.measure.recording import Recording
from draftsmith.infer.measure.split import Split, arrived, parse_split, split_recordings

DAY = 86_400.0
MAY = 1_777_593_600.0  # 2026-05-01, in UTC


def stream(name, time=None, conversation=""):
    return Recording(name, "", [1], [2, 3], conversation or name, time)


def keys(streams):
    return [one.key for one in streams]


def test_time_parts_conversations_by_their_times_whatever_their_order_in_the_file():
    streams = [stream("c", 30.0), stream("a", 10.0), stream("d", 40.0), stream("b", 20.0), stream("e", 40.0)]
    parts = split_recordings(streams, parse_split("time:0.6"))
    assert (keys(parts.earlier), keys(parts.later)) == (["a", "b", "c"], ["d", "e"])


def test_rows_part_by_order_and_never_index_more_than_was_asked_for():
    streams = [stream(name) for name in "abcdefg"]
    parts = split_recordings(streams, parse_split("rows:0.5"))
    assert (keys(parts.earlier), keys(parts.later)) == (["a", "b", "c"], ["d", "e", "f", "g"])


def test_all_turns_of_a_conversation_fall_on_one_side():
    streams = [stream(f"{c}/{t}", conversation=c) for c in "abcd" for t in range(3)]
    parts = split_recordings(streams, parse_split("rows:0.5"))
    assert {one.conversation for one in parts.earlier} == {"a", "b"}
    assert len(parts.earlier) == len(parts.later) == 6


def test_a_date_parts_at_that_moment():
    assert parse_split("time:2026-05-01") == Split("time", moment=MAY)
    streams = [stream("after", MAY), stream("before", MAY - 1), stream("long before", MAY - 90 * DAY)]
    parts = split_recordings(streams, parse_split("time:2026-05-01"))
    assert (keys(parts.earlier), keys(parts.later)) == (["long before", "before"], ["after"])
    assert parts.to_json()["replayed_from"] == "2026-05-01T00:00:00+00:00"
    assert (parts.to_json()["indexed_answers"], parts.to_json()["indexed_tokens"]) == (2, 4)


def test_answers_without_a_time_are_counted_and_named():
    with pytest.raises(ValueError, match=r"1 of 2 answers have no time \(b is the first\): .*created_at.*rows:0\.9"):
        split_recordings([stream("a", 1e9), stream("b")], parse_split("time:0.5"))
    assert keys(arrived([stream("b", 2.0), stream("a", 1.0)])) == ["a", "b"]
    assert keys(arrived([stream("b", 2.0), stream("a")])) == ["b", "a"]


@pytest.mark.parametrize("text", ["", "time", "time:", "rows:x", "hours:0.9", "time:yesterday"])
def test_another_form_is_refused(text):
    with pytest.raises(ValueError, match="is not of the form"):
        parse_split(text)


@pytest.mark.parametrize("text", ["time:0", "rows:1", "rows:1.5", "rows:-0.1", "rows:nan"])
def test_a_share_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="between 0 and 1"):
        parse_split(text)


@pytest.mark.parametrize(("text", "what"), [("rows:0.1", "index"), ("time:2027-01-01", "replay")])
def test_an_empty_part_is_refused(text, what):
    with pytest.raises(ValueError, match=f"leaves nothing to {what} of 2 conversations"):
        split_recordings([stream("a", MAY), stream("b", MAY)], parse_split(text))


def test_the_tokens_that_end_an_answer_are_not_what_was_said():
    assert said([5, 0, 6, 0, 9], {0, 9}) == [5, 0, 6]
    assert said([0], {0}) == []


def test_leakage_counts_answers_and_their_tokens():
    assert leakage([[1], [1, 2, 3]], [False, True]) == {"answers": 1, "share": 0.5, "token_share": 0.75}
