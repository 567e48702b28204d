"""A run folder holds one run, whole, and its answers and traces say what the results say."""

import json

import pytest

from draftsmith.infer.contract.trace import StepTrace
from draftsmith.infer.files.atomic import read_rows
from draftsmith.infer.measure.answer_files import read_answers
from draftsmith.infer.measure.bench import bench
from draftsmith.infer.measure.figures import summarise
from draftsmith.infer.measure.metrics import Totals
from draftsmith.infer.measure.run_folder import RunFolder, answer_paths


@pytest.fixture
def run(fake, coders, questions, clock, tmp_path):
    """A run with a drafter whose name is no file name, and a peer without traces that fails one question."""
    runners = [
        fake("plain"),
        fake("small:models/tiny", per_step=3),
        fake("peer", traced=False, fails_on=lambda prompt: prompt.key == "4/0"),
    ]
    measured = bench(runners, questions, *coders, repeats=2, clock=clock)
    folder = RunFolder.create(tmp_path / "run")
    folder.write_run({"command": ["draftsmith", "bench"], "config": {"seed": 3}, "seed": 3})
    results = summarise(measured)
    folder.write_measured(measured, results)
    return folder, results


def test_the_folder_has_the_five_parts(run):
    folder, results = run
    assert json.loads((folder.path / "run.json").read_text())["seed"] == 3
    assert json.loads((folder.path / "results.json").read_text()) == json.loads(json.dumps(results))
    asked = [json.loads(line) for line in folder.questions_path.read_text().splitlines()]
    assert [row["question_id"] for row in asked] == list(range(6))
    assert asked[3] == {"question_id": 3, "category": "writing", "turns": ["question 3"]}
    assert sorted(answer_paths(folder.path)) == ["peer", "plain", "small:models/tiny"]
    assert len(list((folder.path / "traces").iterdir())) == 2


def test_no_name_leaves_the_folder(run):
    folder, _ = run
    for path in answer_paths(folder.path).values():
        assert path.parent == folder.path / "answers"
    assert folder.answers_path("a/b") != folder.answers_path("a%2Fb")


def test_a_failed_question_has_its_error_and_no_figures(run):
    folder, _ = run
    answers = read_answers(folder.answers_path("peer"))
    assert [answer.question_id for answer in answers if answer.error] == [4]
    assert answers[4].choices == []


def test_answers_hold_every_repeat_and_agree_with_the_results(run):
    folder, results = run
    answers = read_answers(folder.answers_path("small:models/tiny"))
    row = results["drafters"]["small:models/tiny"]
    assert {len(answer.choices) for answer in answers} == {2}
    rate = sum(answer.tokens for answer in answers) / sum(answer.seconds for answer in answers)
    assert rate == pytest.approx(row["end_to_end_tokens_per_s"])
    lengths = [length for answer in answers for length in answer.accept_lengths]
    assert sum(lengths) / len(lengths) == pytest.approx(row["accepted_length"])


def test_the_printed_metrics_can_be_made_again_from_the_traces(run):
    folder, results = run
    totals = Totals.of(
        StepTrace.from_json(row["trace"]) for _, row in read_rows(folder.traces_path("small:models/tiny"))
    )
    row = results["drafters"]["small:models/tiny"]
    assert totals.accepted_length == row["accepted_length"]
    assert totals.tokens_per_s == pytest.approx(row["tokens_per_s"])


def test_a_folder_with_something_in_it_is_refused(run, tmp_path):
    folder, _ = run
    with pytest.raises(ValueError, match="is not empty"):
        RunFolder.create(folder.path)
    with pytest.raises(ValueError, match="is a file"):
        RunFolder.create(folder.path / "run.json")
    (tmp_path / "empty").mkdir()
    assert RunFolder.create(tmp_path / "empty").path.is_dir()
