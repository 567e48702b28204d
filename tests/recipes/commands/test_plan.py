"""`draftsmith plan` as a person runs it: a config alone is enough, and what cannot be is told in one line."""

from __future__ import annotations

import json

import pytest
from tiny_folders import tiny_llama

from draftsmith.infer.costs import timing as latency
from draftsmith.infer.costs.pass_costs import Costs

QUICK = ["--batch_sizes", "1,2", "--contexts", "8,16", "--lengths", "1,3", "--trees", "3x2", "--shapes", "1x32,2x32"]
LEAST = ["--batch_sizes", "1", "--contexts", "8", "--lengths", "2", "--trees", "", "--shapes", "1x16"]


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    """What is told is looked at here, not how steady it is."""
    monkeypatch.setattr(latency, "ROUNDS", (1, 1))


@pytest.fixture
def config(tmp_path):
    """A config.json and nothing else."""
    made = tiny_llama(num_hidden_layers=4).config
    path = tmp_path / "target" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(made.to_dict(), default=str))
    return path


def test_json_holds_every_shape_length_and_batch_size(call, config, tmp_path):
    told = call(
        "plan", "--target", config, *QUICK, "--acceptance", "0.8,0.6", "--out", tmp_path / "costs.json", "--json"
    )
    said = told.json
    assert said["acceptance"] == [0.8, 0.6]
    assert [batch["batch_size"] for batch in said["batches"]] == [1, 2]
    for batch in said["batches"]:
        assert {(s["shape"], s["draft"]) for s in batch["steps"]} == {
            (shape, draft) for shape in ("1x32", "2x32") for draft in ("1", "3", "3x2")
        }
        assert batch["verdict"]
        assert {row["shape"] for row in batch["ranking"]} == {"1x32", "2x32"}
    assert set(said["shapes"]) == {"1x32", "2x32"}
    costs = Costs.load(tmp_path / "costs.json")
    assert costs.target is not None
    assert costs.target.name == "target"
    assert costs.target.parameters == sum(p.numel() for p in tiny_llama(num_hidden_layers=4).parameters())
    assert costs.target.fingerprint == costs.target.tokenizer == ""


def test_tables_and_a_plot_for_people_from_a_folder(call, config, tmp_path):
    told = call("plan", "--target", config.parent, *QUICK, "--plot", tmp_path / "plan.svg")
    assert told.code == 0, told.err
    assert "Batch size 2: plain decoding" in told.out
    assert "acceptance for 1x" in told.out
    assert "No acceptance was given" in told.out
    assert (tmp_path / "plan.svg").is_file()


def test_heads_are_timed_beside_shapes(call, config, tmp_path):
    words = ["--contexts", "8", "--batch_sizes", "1", "--lengths", "2,3", "--trees", "", "--acceptance", "0.7"]
    told = call("plan", "--target", config, *words, "--shapes", "eagle:50,medusa:2,hydra:2,mtp", "--json")
    shapes = told.json["shapes"]
    assert list(shapes)[1:] == ["eagle:50", "medusa:2", "hydra:2", "mtp"]
    assert all(row["measured"] and row["pass_s"]["1"] > 0 for row in shapes.values())
    (batch,) = told.json["batches"]
    assert {step["draft"] for step in batch["steps"] if step["shape"] == "medusa:2"} == {"2"}
    modelled = call("plan", "--target", config, *words, "--shapes", "1x32,eagle,medusa", "--machine", "h100")
    assert modelled.code == 0, modelled.err
    assert "medusa:4" in modelled.out
    wrong = call("plan", "--target", config, *words, "--shapes", "medusa:no")
    assert (wrong.code, "is no head" in wrong.err.splitlines()[-1]) == (2, True)


def test_a_measured_acceptance_is_taken_from_its_file(call, config, tmp_path):
    row = {"steps": 10, "by_depth": [{"depth": 1, "reached": 10, "accepted": 9, "share": 0.9}]}
    (tmp_path / "bench.json").write_text(json.dumps({"drafters": {"small": row}}))
    told = call("plan", "--target", config, *LEAST, "--acceptance", tmp_path / "bench.json", "--json")
    assert told.json["acceptance"] == [0.9]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--shapes", "2x33"], "heads of 8"),
        (["--shapes", "0x32"], "no shape"),
        (["--shapes", "2x32x3"], "3 heads"),
        (["--shapes", "1x32", "--estimate", "3x32"], "3 measured shapes or more"),
        (["--lengths", "0"], "--lengths takes one or more values, each a whole number of at least 1, not '0'"),
        (
            ["--batch_sizes", "1,many"],
            "--batch_sizes takes one or more values, each a whole number of at least 1, not 'many'",
        ),
        (["--contexts", "600"], "512 positions"),
        (["--trees", "2x9"], "no tree"),
        (["--acceptance", "1.5"], "from 0 to 1"),
        (["--acceptance", "nowhere.json"], "nor a file"),
        (["--dtype", "int3"], "unknown dtype"),
        (["--device", "abacus"], "unknown device"),
        (["--training_tokens", "0"], "at least 1"),
        (["--seconds", "0.001"], "too few"),
        (["--out", "no/such/folder/costs.json"], "cannot be written"),
        (["--plot", "."], "cannot be written"),
        (["--context", "-1"], "context"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(call, config, words, expected):
    told = call("plan", "--target", config, *QUICK, *words)
    assert told.code == 2, (told.out, told.err)
    assert told.out == ""
    line = told.err.splitlines()[-1]
    assert line.startswith("draftsmith plan: ")
    assert expected in line
    assert "Traceback" not in told.err


@pytest.mark.parametrize(
    ("text", "expected"),
    [('{"model_type": "bloom"}', "ALiBi"), ('{"model_type": "mamba2"}', "state-space"), ("{", "could not be read")],
)
def test_a_target_that_cannot_be_planned_for_is_told_in_one_line(call, tmp_path, text, expected):
    (tmp_path / "config.json").write_text(text)
    told = call("plan", "--target", tmp_path / "config.json", *QUICK)
    assert told.code == 2
    assert expected in told.err.splitlines()[-1]
    assert len(told.err.splitlines()) == 1


def test_nothing_is_where_the_target_should_be(call, tmp_path):
    told = call("plan", "--target", tmp_path / "nowhere", *QUICK)
    assert told.code == 2
    assert "does not exist" in told.err


def test_the_script_leaves_costs_and_a_plot(script, config, tmp_path):
    done = script("plan", config, "0.6", *LEAST)
    assert done.returncode == 0, done.stderr
    assert "acceptance of chains 0.60" in " ".join(done.stdout.split())
    assert (tmp_path / "costs.json").is_file()
    assert (tmp_path / "plan.svg").is_file()


def test_a_machine_that_is_not_here_is_modelled_and_every_result_says_so(call, config, tmp_path):
    words = ["--target", config, *QUICK, "--machine", "h100", "--dtype", "bfloat16", "--acceptance", 0.7]
    said = call("plan", *words, "--out", tmp_path / "costs.json", "--json").json
    assert said["modelled"] is True
    assert not any(row["measured"] for row in said["shapes"].values())
    assert said["machine"]["modelled"] is True
    assert said["machine"]["figures"]["bandwidth"] == 3.35e12
    assert Costs.load(tmp_path / "costs.json").machine["modelled"] is True
    told = call("plan", *words)
    assert told.code == 0, told.err
    titles = [line for line in told.out.splitlines() if line.startswith(("Batch size", "Verdict", "A pass"))]
    assert len(titles) == 5
    assert all("(modelled on an H100)" in line for line in titles)
    assert "NVIDIA H100 Tensor Core GPU data sheet" in told.out


@pytest.mark.parametrize(
    ("machine", "expected"),
    [("h1000", "unknown machine 'h1000': h100, a100"), ("none.yaml", "none.yaml does not exist")],
)
def test_a_machine_that_is_unknown_is_refused_in_one_line(call, config, machine, expected):
    told = call("plan", "--target", config, *QUICK, "--machine", machine)
    assert told.code == 2
    assert expected in told.err.splitlines()[-1]
    assert "Traceback" not in told.err
