"""Recordings read from records, split in two, and checked for leakage."""

import pytest

from draftsmith.infer.measure.recordings import (
    Recording,
    Split,
    arrived,
    leakage,
    parse_split,
    recordings,
    split_recordings,
    without_ends,
)
from draftsmith.infer.text.record import Message, Record
from draftsmith.infer.text.templates import find_template

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
    assert without_ends([5, 0, 6, 0, 9], {0, 9}) == [5, 0, 6]
    assert without_ends([0], {0}) == []


def test_leakage_counts_answers_and_their_tokens():
    assert leakage([[1], [1, 2, 3]], [False, True]) == {"answers": 1, "share": 0.5, "token_share": 0.75}


def test_token_ids_of_a_record_are_used_as_they_are(folders):
    template = find_template("chat", folders.tokenizer)
    messages = [Message("user", "one"), Message("assistant", "other text than the ids")]
    record = Record("r", messages=messages, token_ids=[9, 9, 3], prompt_token_ids=[7, 8])
    (found,) = recordings([record], template)
    assert (found.prompt, found.answer) == ([7, 8], [9, 9, 3])
    (found,) = recordings([Record("r", messages=messages, token_ids=[9, 9, 3])], template)
    assert (found.prompt, found.answer) == (template.prompt_ids(messages[:1]), [9, 9, 3])


def test_every_answered_turn_is_a_recording_of_its_own(folders):
    template = find_template("chat", folders.tokenizer)
    said = [Message("user", "one"), Message("assistant", "two"), Message("user", "three"), Message("assistant", "four")]
    found = recordings([Record("r", "qa", messages=said, source="f", row=3)], template)
    assert [one.prompt for one in found] == [template.prompt_ids(said[:1]), template.prompt_ids(said[:3])]
    assert [folders.tokenizer.decode(one.answer) for one in found] == ["two<|end|>", "four<|end|>"]
    assert [one.key for one in found] == ["f:3/0", "f:3/1"]


def test_nothing_to_replay_is_said(folders):
    with pytest.raises(ValueError, match="no record holds an answer"):
        recordings([], find_template("chat", folders.tokenizer))
