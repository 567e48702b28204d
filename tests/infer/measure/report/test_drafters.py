"""What a report says of a drafter besides its figures."""

import json

import pytest

from draftsmith.infer.measure.report.drafters import about, duration, size_text
from draftsmith.infer.measure.report.runs import read_runs

REGISTRY = {
    "pld": {"class_path": "x", "elsewhere": {"vLLM": "serve {target}"}},
    "small": {"class_path": "x", "argument": "model", "elsewhere": {"transformers": "load {argument}"}},
    "rest": {"class_path": "x", "argument": "store"},
    "oracle": {"class_path": "x", "control": True},
}


@pytest.fixture
def told(run_folder):
    """About each runner of one run, by label."""

    def told(runners, **config):
        (run,) = read_runs([run_folder("run", runners, **config)])
        return {label: about(run, label, REGISTRY) for label in run.results["drafters"]}

    return told


def test_kinds_and_places(told):
    found = told({"pld": {}, "oracle": {}, "peer": {"traced": False}}, drafters="pld,oracle", target="org/model")
    assert {label: one.kind for label, one in found.items()} == {
        "plain": "plain",
        "pld": "drafter",
        "oracle": "control",
        "peer": "peer",
    }
    assert found["pld"].runs == ("here", "vLLM")
    assert found["pld"].elsewhere == {"vLLM": "serve org/model"}
    assert (found["pld"].made, found["pld"].adds) == ("nothing to make", "nothing")
    assert found["peer"].runs == ("transformers",)


def test_a_trained_draft_tells_its_time_and_its_weights(told, tmp_path):
    draft = tmp_path / "draft"
    draft.mkdir()
    (draft / "run.json").write_text(json.dumps({"train_seconds": 660.0, "max_steps": 250}))
    (draft / "model.safetensors").write_bytes(b"0" * 21_000)
    found = told({"small": {}}, drafters=f"small:{draft}")["small"]
    assert (found.made, found.adds) == ("trained in 11 min, 250 steps", "21 kB weights")
    assert found.elsewhere == {"transformers": f"load {draft}"}


def test_a_mix_costs_what_its_drafters_cost(told, tmp_path):
    draft = tmp_path / "draft"
    draft.mkdir()
    (draft / "model.safetensors").write_bytes(b"0" * 21_000)
    found = told({"mix": {}}, drafters=f"mix=pld+small:{draft}[nodes=3]")["mix"]
    assert (found.kind, found.made, found.adds) == (
        "drafter", "small: cost not recorded", "small: 21 kB weights"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("store", "made"),
    [
        ({"build": {"seconds": 24.4}, "keys": 46807}, "a store of 46,807 tokens, built in 24 s"),
        ({"counts": {"tokens": 1200}}, "a store of 1,200 tokens; time not recorded"),
        ({}, "a store; time not recorded"),
    ],
)
def test_a_store_tells_what_it_holds(told, tmp_path, store, made):
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "store.json").write_text(json.dumps(store))
    (folder / "tokens").write_bytes(b"0" * 2000)
    found = told({"mine": {}}, drafters=f"mine=rest:{folder}[nodes=8]")["mine"]
    assert found.made == made
    assert found.adds.endswith("kB store")
    assert found.runs == ("here",)


def test_what_is_not_there_is_said_not_to_be_there(told, tmp_path):
    (tmp_path / "bare").mkdir()
    runners = {"small": {}, "gone": {}, "mine": {}}
    found = told(runners, drafters=f"small:{tmp_path / 'bare'},gone=small:org/draft,mine=more.yaml")
    assert (found["small"].made, found["small"].adds) == ("cost not recorded", "unknown")
    assert found["gone"].made == "unknown: its folder is not on this machine"
    assert found["mine"].made == "not recorded: see more.yaml"


def test_sizes_and_times_in_words():
    assert [size_text(count) for count in (0, 999, 1500, 20_900_000, 7e12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "21 MB",
        "7000 GB",
    ]
    assert [duration(seconds) for seconds in (0.05, 24.4, 660, 9000)] == ["0.1 s", "24 s", "11 min", "2.5 h"]
