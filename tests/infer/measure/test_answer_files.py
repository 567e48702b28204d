"""Spec-Bench's answer format, written and read; what is malformed is named by file and row."""

import gzip
import json
import os

import pytest

from draftsmith.infer.contract.trace import StepTrace
from draftsmith.infer.files.atomic import read_rows, written_beside
from draftsmith.infer.measure.answer_files import (
    Answer,
    Choice,
    TraceRow,
    read_answers,
    task_of,
    write_answers,
    write_traces,
)

SPEC_BENCH_ROW = {
    "question_id": 81,
    "category": "writing",
    "answer_id": "abc",
    "model_id": "vicuna-7b",
    "choices": [
        {
            "index": 0,
            "turns": ["first", "second"],
            "decoding_steps": [4, 5],
            "new_tokens": [10, 12],
            "wall_time": [0.5, 0.75],
            "accept_lengths": [3, 3, 2, 2, 3, 3, 2, 2, 2],
        }
    ],
    "tstamp": 1.0,
}


@pytest.fixture
def write(tmp_path):
    def write_rows(*rows):
        path = tmp_path / "answers.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write_rows


def with_choice(**changes):
    return SPEC_BENCH_ROW | {"choices": [SPEC_BENCH_ROW["choices"][0] | changes]}


def test_spec_benchs_own_row_is_read(write):
    (answer,) = read_answers(write(SPEC_BENCH_ROW))
    assert (answer.question_id, answer.category, answer.model_id) == (81, "writing", "vicuna-7b")
    assert (answer.tokens, answer.seconds, answer.error) == (22, 1.25, "")
    assert answer.accept_lengths == [3, 3, 2, 2, 3, 3, 2, 2, 2]
    assert answer.choices[0].token_ids == []


def test_our_rows_have_spec_benchs_keys_and_ours(tmp_path):
    path = tmp_path / "a.jsonl"
    choice = Choice(["hé"], [2], [0.5], [1], [2], [[7, 8]])
    write_answers(path, [Answer(1, "qa", "pld", [choice]), Answer("x", "qa", "pld", error="RuntimeError: no")])
    good, bad = [json.loads(line) for line in path.read_text().splitlines()]
    assert set(good) == {"question_id", "category", "answer_id", "model_id", "choices", "tstamp"}
    assert set(good["choices"][0]) - {"token_ids"} == set(SPEC_BENCH_ROW["choices"][0])
    assert good["choices"][0]["index"] == 0
    assert bad["error"] == "RuntimeError: no"
    assert bad["choices"] == []
    assert read_answers(path) == [Answer(1, "qa", "pld", [choice]), Answer("x", "qa", "pld", error="RuntimeError: no")]


def test_a_failed_turn_of_spec_bench_is_an_error_and_its_borrowed_figures_are_not_read(write):
    (answer,) = read_answers(write(with_choice(turns=["first", "ERROR"])))
    assert answer.error == "turn 2 failed"
    assert answer.choices == []
    assert not answer.timed


def test_an_answer_with_token_ids_may_say_error(write):
    (answer,) = read_answers(write(with_choice(turns=["first", "ERROR"], token_ids=[[1], [2]])))
    assert answer.error == ""


def test_answers_without_figures_are_answers_all_the_same(write):
    (answer,) = read_answers(write({"question_id": 1, "choices": [{"index": 0, "turns": ["hello"]}]}))
    assert not answer.timed
    assert answer.choices[0].turns == ["hello"]


def test_blank_lines_are_passed_over_and_gz_is_read(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write("\n" + json.dumps(SPEC_BENCH_ROW) + "\n\n")
    assert len(read_answers(path)) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"question_id": 82, "choi', "not JSON"),
        ([1, 2], "JSON object"),
        ({"choices": SPEC_BENCH_ROW["choices"]}, "question_id is missing"),
        (SPEC_BENCH_ROW | {"choices": []}, "choices is missing or empty"),
        (SPEC_BENCH_ROW | {"choices": [{"turns": "text"}]}, "turns, a list of texts"),
        (with_choice(new_tokens=[1]), "new_tokens has 1 entries for 2 turns"),
        (with_choice(wall_time=[0.5, "fast"]), "wall_time is not a list of numbers"),
        (with_choice(wall_time=[0.5, -1]), "wall_time is not a list of numbers"),
        (with_choice(wall_time=[0.5, float("nan")]), "wall_time is not a list of numbers"),
        (with_choice(wall_time=[0, 0]), "adds up to 0"),
        (with_choice(wall_time=[]), "must both be there, or neither"),
        (with_choice(token_ids=[[1, 2]]), "token_ids is not a list of 2 lists"),
        (with_choice(token_ids=[[1], ["a"]]), "token_ids is not a list of 2 lists"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_number(write, row, message):
    path = write(SPEC_BENCH_ROW, row)
    with pytest.raises(ValueError, match=message) as caught:
        read_answers(path)
    assert f"{path}, row 2: " in str(caught.value)


def test_an_empty_or_absent_file_is_refused(write, tmp_path):
    with pytest.raises(ValueError, match="holds no answers"):
        read_answers(write())
    with pytest.raises(ValueError, match="no such answer file"):
        read_answers(tmp_path / "nothing.jsonl")


def test_the_eight_categories_of_mt_bench_are_one_task():
    eight = ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"]
    assert {task_of(category) for category in eight} == {"mt_bench"}
    assert task_of("math_reasoning") == "math_reasoning"


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_traces_come_back_as_they_were(tmp_path, trace, name):
    one = trace(committed=3, nodes=4, tried=[(1, "pld", True), (2, "pld", True)])
    one.exits = [(1, 6)]
    one.nodes_by_source = {"pld": 4}
    write_traces(tmp_path / name, [TraceRow(1, 0, 1, one), TraceRow("x", 1, 0, trace())])
    found = [(row, StepTrace.from_json(row.pop("trace"))) for _, row in read_rows(tmp_path / name)]
    assert found == [
        ({"question_id": 1, "choice": 0, "turn": 1}, one),
        ({"question_id": "x", "choice": 1, "turn": 0}, trace()),
    ]


def test_the_same_traces_give_the_same_bytes(tmp_path, trace):
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_traces(tmp_path / name, [TraceRow(1, 0, 0, trace())])
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_file_is_whole_or_not_there(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(TypeError), written_beside(path) as text:
        text.writelines(["half", None])
    assert os.listdir(tmp_path) == []
    with written_beside(path) as text:
        text.write("whole")
    with pytest.raises(TypeError), written_beside(path) as text:
        text.writelines(["half", None])
    whole = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
    assert whole == b"whole"
    assert os.listdir(tmp_path) == [name]
