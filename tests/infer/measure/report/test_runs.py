"""Run folders for a report: what is refused, and how runs and drafters are told apart."""

import json

import pytest

from draftsmith.infer.measure.report.runs import other_settings, read_runs
from draftsmith.infer.measure.run_folder import machine


def test_runs_are_ordered_and_labelled_by_temperature_and_batch(run_folder):
    paths = [
        run_folder("c", {"pld": {}}, batch_size=3),
        run_folder("a", {"pld": {}}),
        run_folder("b", {"pld": {}}, temperature=0.8),
    ]
    runs = read_runs(paths)
    assert [run.path.name for run in runs] == ["a", "c", "b"]
    assert [run.label for run in runs] == [
        "batch 1, temperature 0",
        "batch 3, temperature 0",
        "batch 1, temperature 0.8",
    ]
    assert [run.place for run in runs] == ["batch 1", "batch 3", "batch 1"]
    assert [run.names["pld"] for run in runs] == ["pld", "pld", "pld"]


def test_one_label_for_two_drafters_is_shown_as_it_was_written(run_folder):
    one = run_folder("one", {"rest": {}}, drafters="rest:store[nodes=8]")
    two = run_folder("two", {"rest": {}}, drafters="rest:store[nodes=64]", batch_size=2)
    runs = read_runs([one, two])
    assert [run.names["rest"] for run in runs] == ["rest:store[nodes=8]", "rest:store[nodes=64]"]


def test_the_same_drafter_twice_under_the_same_settings_is_told_by_its_folder(run_folder):
    runs = read_runs([run_folder("one", {"pld": {}}), run_folder("two", {"pld": {}})])
    assert [run.label for run in runs] == ["batch 1, one", "batch 1, two"]
    assert [run.names for run in runs] == [
        {"plain": "plain", "pld": "pld in one"},
        {"plain": "plain", "pld": "pld in two"},
    ]


def test_a_folder_that_is_named_twice_counts_once(run_folder):
    path = run_folder("one", {"pld": {}})
    assert len(read_runs([path, path.parent / "." / "one"])) == 1


def test_what_else_differs_is_told(run_folder):
    one = run_folder("one", {"pld": {}}, max_new_tokens=32)
    two = run_folder("two", {"pld": {}}, batch_size=2, max_new_tokens=64)
    assert other_settings(read_runs([one, two])) == {"max_new_tokens": ["32", "64"]}


def test_two_targets_are_refused(run_folder):
    paths = [run_folder("one", {}, target="a/model"), run_folder("two", {}, target="b/model")]
    with pytest.raises(ValueError, match="one target, and these runs have a/model, b/model"):
        read_runs(paths)


@pytest.mark.parametrize("name", ["run.json", "results.json"])
def test_an_unfinished_or_damaged_run_is_refused_in_one_line(run_folder, name):
    path = run_folder("one", {"pld": {}})
    (path / name).write_text("{")
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        read_runs([path])
    (path / name).write_text("[]")
    with pytest.raises(ValueError, match="one JSON object"):
        read_runs([path])
    (path / name).unlink()
    with pytest.raises(ValueError, match=f"not a finished run folder: it has no {name}"):
        read_runs([path])


def test_results_of_something_else_are_refused(run_folder):
    path = run_folder("one", {"pld": {}})
    (path / "results.json").write_text(json.dumps({"drafters": {}}))
    with pytest.raises(ValueError, match="not written by bench: it lacks baseline"):
        read_runs([path])


def test_no_folder_at_all_is_refused():
    with pytest.raises(ValueError, match="one run folder or more"):
        read_runs([])


def test_the_machine_is_the_gpu_where_one_was_used():
    cpu = {"model": "EPYC", "cores": 8, "cores_usable": 2}
    gpu = {"name": "H200"}
    assert machine({"hardware": {"cpu": cpu, "gpus": []}}) == "EPYC, 2 cores"
    assert machine({"hardware": {"cpu": cpu, "gpus": [gpu, gpu]}}) == "2 x H200"
    assert machine({"hardware": {"cpu": cpu, "gpus": [gpu]}, "config": {"device": "cpu"}}) == "EPYC, 2 cores"
