"""Answers on disk: rows are whole or not there."""

from __future__ import annotations

import pytest

from draftsmith.infer.answers.answer_file import AnswerFile, with_keys
from draftsmith.infer.text.record import Record

CONFIG = {"target": "t", "seed": 0}
ROW = {"output": "x"}


@pytest.mark.parametrize("torn", [b'{"question_id": "c", "out', b'{"question_id": "c", "output": "x"}', b"{", b"\xc3"])
def test_a_torn_last_line_is_cut_off_and_asked_again(tmp_path, torn):
    path = tmp_path / "deep" / "answers.jsonl"
    with AnswerFile(path, CONFIG) as file:
        file.write("a", ROW)
        file.write("b", ROW)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with AnswerFile(path, CONFIG) as file:
        assert file.done == {"a", "b"}
        file.write("c", ROW)
    assert path.read_bytes() == whole + b'{"question_id": "c", "output": "x"}\n'


def test_a_row_is_on_disk_before_the_next_is_begun(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path, CONFIG) as file:
        for number, key in enumerate("abc", start=1):
            file.write(key, ROW)
            assert len(path.read_text().splitlines()) == number


def test_a_damaged_row_before_the_last_is_named_and_nothing_is_overwritten(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path, CONFIG) as file:
        file.write("a", ROW)
    path.write_bytes(damaged := path.read_bytes() + b'{"question_id": \n' + b'{"question_id": "c"}\n')
    with pytest.raises(ValueError, match="row 2 is not an answer"), AnswerFile(path, CONFIG):
        pass
    assert path.read_bytes() == damaged


def test_other_settings_are_refused_once_there_is_an_answer(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path, CONFIG | {"target": "mistyped"}):
        pass
    with AnswerFile(path, CONFIG) as file:
        file.write("a", ROW)
    with pytest.raises(ValueError, match=r"other settings \(seed\)"), AnswerFile(path, CONFIG | {"seed": 1}):
        pass
    with AnswerFile(path, CONFIG) as file:
        assert file.done == {"a"}


def test_a_file_of_somebody_else_is_refused(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"question_id": "a"}\n')
    with pytest.raises(ValueError, match="not written by"), AnswerFile(path, CONFIG):
        pass
    assert path.read_text() == '{"question_id": "a"}\n'


def test_records_that_share_an_id_get_keys_of_their_own():
    records = [Record(name) for name in ("7", "8", "7", "7")]
    assert [one.key for one in with_keys(records)] == ["7", "8", "7#2", "7#3"]
