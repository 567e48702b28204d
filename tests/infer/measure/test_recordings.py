"""Recordings read from records, split in two, and checked for leakage."""

import json

import pytest

from draftsmith.infer.measure.recordings import (
    Held,
    Recording,
    Split,
    arrived,
    leakage,
    parse_split,
    prompt_to_find,
    recordings,
    split_recordings,
    with_questions,
    without_ends,
)
from draftsmith.infer.text.record import Message, Record
from draftsmith.infer.text.records import ReadReport, read_records
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


def test_leakage_counts_answers_prompts_and_their_tokens():
    streams = [Recording("a", "", [1, 2, 3, 4], [1]), Recording("b", "", [1], [1, 2, 3])]
    assert leakage(streams, [Held(False, True), Held(True, True)]) == {
        "answers": 1, "share": 0.5, "token_share": 0.75,
        "prompts": 2, "prompt_share": 1.0, "prompt_token_share": 1.0, "left_out": 2,
    }  # fmt: skip


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


QUESTIONS = [{"question_id": 81, "category": "writing", "turns": ["who?", "why?"], "system": "be brief"},
             {"question_id": 82, "category": "math", "turns": ["how many?"]}]  # fmt: skip


def answer_row(id, *turns, **more):
    return {
        "question_id": id,
        "answer_id": "x",
        "model_id": "m",
        "choices": [{"index": 0, "turns": list(turns)} | more],
    }


def joined(folder, answers, questions=None, place="model_answer/vicuna.jsonl", name="question.jsonl"):
    """The records of an answer file, with the questions at `name`."""
    path = folder / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in answers))
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    report = ReadReport()
    return list(with_questions(read_records([path], report=report), questions, report)), report


def texts(record):
    return [(message.role, message.content) for message in record.messages]


@pytest.mark.parametrize("name", ["question.jsonl", "questions.jsonl"])
@pytest.mark.parametrize("place", ["model_answer/vicuna.jsonl", "vicuna.jsonl"])
def test_answer_files_get_the_questions_beside_them_or_one_folder_up(tmp_path, place, name):
    records, report = joined(tmp_path, [answer_row(81, "me", "so"), answer_row(82, "two")], None, place, name)
    assert texts(records[0]) == [
        ("system", "be brief"), ("user", "who?"), ("assistant", "me"), ("user", "why?"), ("assistant", "so")
    ]  # fmt: skip
    assert [record.category for record in records] == ["writing", "math"]
    assert report.used == 2


def test_every_turn_is_replayed_with_the_ids_that_our_own_answer_files_keep(tmp_path, folders):
    rows = [answer_row(81, "me", "so", token_ids=[[5, 6, 1], [7]])]
    template = find_template("chat", folders.tokenizer)
    found = recordings(joined(tmp_path, rows)[0], template)
    assert [one.answer for one in found] == [[5, 6, 1], [7]]
    asked = [
        Message("system", "be brief"),
        Message("user", "who?"),
        Message("assistant", "me"),
        Message("user", "why?"),
    ]
    assert [one.prompt for one in found] == [template.prompt_ids(asked[:2]), template.prompt_ids(asked)]
    assert [folders.tokenizer.decode(one.question) for one in found] == ["who?", "why?"]
    by_text = recordings(joined(tmp_path, [answer_row(81, "me", "so")])[0], template)
    assert [folders.tokenizer.decode(one.answer) for one in by_text] == ["me<|end|>", "so<|end|>"]
    assert [one.prompt for one in by_text] == [one.prompt for one in found]


def test_answers_that_failed_or_fit_no_question_are_counted(tmp_path):
    rows = [answer_row(82, "two"), answer_row(82, "ERROR"), answer_row(99, "x"), answer_row(82, "a", "b")]
    records, report = joined(tmp_path, rows)
    assert ([record.row for record in records], report.used) == ([1], 1)
    assert {reason: tally.places[0].split()[-1] for reason, tally in report.skipped.items()} == {
        "an answer that failed": "2",
        "its question is not in the file of questions": "3",
        "more answers than the question has turns": "4",
    }
    with pytest.raises(ValueError, match=r"no answer fits its question; .*row 1: .*question_id 99, .*question\.jsonl"):
        joined(tmp_path, [answer_row(99, "x")])


def test_answers_whose_questions_cannot_be_found_say_how_to_name_them(tmp_path):
    path = tmp_path / "a" / "b" / "answers.jsonl"
    with pytest.raises(ValueError, match=r"no questions\.jsonl or question\.jsonl beside it or one folder up: give --"):
        joined(tmp_path, [answer_row(82, "two")], place="a/b/answers.jsonl")
    records, _ = joined(tmp_path, [answer_row(82, "two")], tmp_path / "mine.jsonl", "a/b/answers.jsonl", "mine.jsonl")
    assert texts(records[0]) == [("user", "how many?"), ("assistant", "two")]
    assert records[0].source == str(path)
    with pytest.raises(ValueError, match=r"no row needs the questions of .*: all have prompts of their own"):
        joined(tmp_path, [{"prompt": "who?", "output": "me"}], tmp_path / "mine.jsonl", name="mine.jsonl")


def test_the_outer_tokens_of_a_long_prompt_are_not_compared():
    assert prompt_to_find(Recording("a", "", [1], [2], question=[5, 6]), set()) == [5, 6]
    assert prompt_to_find(Recording("a", "", [1], [2], question=list(range(10))), set()) == list(range(1, 9))
    assert prompt_to_find(Recording("a", "", [0, 5, 6, 0], [2]), {0}) == [5, 6]
