"""A whole study of a tiny target: what is finished is not done again, and its figures are those of the step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from draftsmith.infer.text.records import read_records
from draftsmith.recipes.studies import study as study_module
from draftsmith.recipes.studies.sorted_training import all_runs, sorted_training
from draftsmith.train.drafts.exits import ExitStates
from draftsmith.train.run.config import Machine, Optim, Text
from draftsmith.train.run.validation import accepted_lengths

RECIPE = Path(__file__).resolve().parents[3] / "recipes" / "sorted_training.yaml"


@pytest.fixture(scope="module")
def study(target_folder, chats, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    questions = folder / "questions.jsonl"
    rows = [{"question_id": i, "turns": [f"go on from {i}"]} for i in range(8)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(**changes):
        given = {
            "target": str(target_folder), "data": [str(chats)], "questions": [str(questions)],
            "out": str(folder / "out"), "num_layers": 4, "exits": [2, 4], "max_steps": 3, "seeds": [0, 1],
            "max_new_tokens": 8, "num_draft_tokens": 3,
            "text": Text(max_length=128, held_out=0.2, cache=str(folder / "cache")),
            "optim": Optim(lr=1e-4, batch_size=2),
            "machine": Machine(device="cpu", precision="32-true", workers=0),
        }  # fmt: skip
        return sorted_training(**{**given, **changes})

    return folder / "out", run, run()


def test_a_study_trains_every_run_with_every_seed_and_compares_them(study):
    out, _, results = study
    assert {path.name for path in (out / "runs").iterdir()} == {
        f"{kind}-{seed}" for kind in ("soft", "sft", "sft-2") for seed in (0, 1)
    }
    assert results["prompts"]["all"] == 8
    assert {name: list(exits) for name, exits in results["runs"].items()} == {
        "soft": ["2", "4"], "sft": ["2", "4"], "sft-2": ["2"],
    }  # fmt: skip
    compared = [(row["run"], row["over"], row["way"]) for row in results["ratios"]]
    assert compared == [("soft", "sft", "2"), ("soft", "sft-2", "2"), ("soft", "sft", "4")]
    for exits in results["runs"].values():
        for row in exits.values():
            low, high = row["all"]["interval"]
            assert 1 <= low <= row["all"]["accepted_length"] <= high <= 4
    assert results["runs"]["soft"]["4"]["all"]["accepted_length"] > 1.5
    assert (out / "results.md").read_text().count("\n") == 13


def test_a_draft_is_measured_as_validation_measures_it(study, target_folder):
    from draftsmith.infer.models.load import load_model, load_target
    from draftsmith.infer.text.templates import find_template

    out, _, results = study
    target = load_target(str(target_folder), device="cpu")
    model, _ = load_model(str(out / "runs" / "soft-1"), device="cpu")
    template, questions = find_template("chat", target.tokenizer), [str(out.parent / "questions.jsonl")]
    prompts = [template.prompt_ids(record.prompt) for record in read_records(questions, need="questions")]
    drafters = ExitStates(model, [2, 4]).drafters(num_draft_tokens=3)
    lengths = list(accepted_lengths(target, drafters, prompts, max_new_tokens=8).values())
    rows = results["runs"]["soft"]
    assert [rows[exit]["all"]["by_seed"][1] for exit in ("2", "4")] == pytest.approx(lengths)
    trained = json.loads((out / "runs" / "soft-1" / "run.json").read_text())["results"]
    assert [rows[exit]["loss_by_seed"][1] for exit in ("2", "4")] == pytest.approx(
        [trained[f"loss_exit_{exit}"] for exit in (2, 4)], rel=1e-5
    )


def test_what_is_finished_is_not_done_again_and_what_is_missing_is(study, monkeypatch):
    out, run, results = study
    trained = []
    train = study_module.train_draft
    monkeypatch.setattr(study_module, "train_draft", lambda objective, config: trained.append(config.out))
    assert run() == results
    assert trained == []
    monkeypatch.setattr(study_module, "train_draft", train)
    (out / "measured" / "sft-2-1.json").unlink()
    assert run(only=["sft-2"]) == results
    more = run(only=["soft-1-3"], exit_weights=[[1, 3]], seeds=[0])
    assert [exit["seeds"] for exit in more["runs"]["soft-1-3"].values()] == [[0], [0]]
    assert [row["seeds"] for row in more["ratios"] if row["run"] == "soft-1-3"] == [[0]] * 3
    kept = json.loads((out / "runs" / "soft-1-3-0" / "run.json").read_text())["settings"]["objective"]
    assert kept["weights"] == [0.25, 0.75]


def test_another_study_is_not_mixed_into_a_folder(study):
    _, run, _ = study
    with pytest.raises(ValueError, match="holds a study with another max_steps: give a new folder"):
        run(max_steps=4)
    with pytest.raises(ValueError, match="no run is called 'sft-3': soft, sft, sft-2"):
        run(only=["sft-3"])


@pytest.mark.slow
def test_the_recipe_runs_as_a_command_of_its_own(target_folder, chats, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question_id": 0, "turns": ["go on from 1"]}) + "\n")
    words = [sys.executable, "-m", "draftsmith.recipes.studies.sorted_training", "--config", RECIPE, "--target",
             target_folder, "--data", f"[{chats}]", "--questions", f"[{questions}]", "--out", tmp_path / "out",
             "--only", "[soft]",
             "--seeds", "[0]", "--max_steps", "1", "--max_new_tokens", "4", "--text.max_length", "128",
             "--text.cache", tmp_path / "cache"]  # fmt: skip
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert list(told["runs"]["soft"]) == ["1", "2", "4"]
    assert told["ratios"] == []
    assert "| soft | 4 |" in done.stderr


def test_runs_are_named_by_what_they_are():
    runs = all_runs(4, [1, 2, 4], [[1, 1, 4], [0, 0.5, 1]])
    assert [run.name for run in runs] == ["soft", "sft", "sft-1", "sft-2", "soft-1-1-4", "soft-0-0.5-1"]
    assert runs[-1].objective().weights == pytest.approx([0, 1 / 3, 2 / 3])
    with pytest.raises(ValueError, match="2 exit weights for 3 exits"):
        all_runs(4, [1, 2, 4], [[1, 1]])
