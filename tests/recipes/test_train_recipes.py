"""Every training recipe runs a few steps through the command line, on a tiny target in place of its own."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig

from draftsmith.infer.heads.folders import load_eagle, load_hydra, load_medusa
from draftsmith.recipes.cli.argv import parameters
from draftsmith.recipes.cli.main import run
from draftsmith.recipes.commands.train import sft, soft
from draftsmith.train.drafts.exits import ExitStates, TrainContext
from draftsmith.train.drafts.shapes import find_preset
from draftsmith.train.objectives.objective import LossSums
from draftsmith.train.run.target import random_llama, train_tokenizer

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
TINY = ["--text.max_length", "448", "--machine.device", "cpu", "--machine.workers", "0", "--optim.batch_size", "2",
        "--optim.micro_batch_size", "1", "--watch.val_prompts", "0", "--watch.val_every", "0"]  # fmt: skip


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"count from {i}"},
                          {"role": "assistant", "content": " ".join(str(i + k) for k in range(9))}]}
            for i in range(30)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def target(chats, tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    tokenizer = train_tokenizer(iter([chats.read_text()]), 300)
    random_llama(tokenizer, 64, 12, 512, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "name",
    ["train_sft", "train_soft", "train_distil", "train_sft_small", "train_soft_small", "train_distil_small",
     "train_target"],
)  # fmt: skip
def test_a_recipe_trains_and_its_flags_override_it(name, target, chats, tmp_path, capsys):
    kind = name.split("_")[1]
    words = ["train", kind, "--config", str(RECIPES / f"{name}.yaml"), "--data", str(chats), "--out",
             str(tmp_path / "out"), "--max_steps", "2", "--minutes", "null", "--text.cache", str(tmp_path / "cache"),
             "--json", *TINY]  # fmt: skip
    words += ["--vocab_size", "300", "--hidden_size", "64"] if kind == "target" else ["--target", str(target)]
    assert run(words) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["max_steps"] == 2
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    layers = recipe["num_layers"] if "num_layers" in recipe else find_preset(recipe["preset"]).num_layers
    assert config["num_hidden_layers"] == layers
    assert config.get("sorted_exits") == recipe.get("exits")
    kept = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert kept["optim"]["lr"] == recipe["optim"]["lr"]
    assert kept["text"]["max_length"] == 448
    assert not (tmp_path / "out" / "start").exists()


@pytest.fixture
def trained(call, target, chats, tmp_path):
    """Train a head by its recipe; the recipe, and the settings that were kept."""

    def train(name):
        words = ["--config", RECIPES / f"{name}.yaml", "--target", target, "--data", chats, "--out", tmp_path / "out"]
        words += ["--max_steps", "2", "--minutes", "null", "--text.cache", tmp_path / "cache", *TINY]
        kept = call("train", name.split("_")[1], *words, "--json").json["settings"]
        recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
        assert kept["optim"]["lr"] == recipe["optim"]["lr"]
        return recipe, kept

    return train


@pytest.mark.parametrize("name", ["train_medusa", "train_hydra", "train_medusa_small", "train_hydra_small"])
def test_a_recipe_trains_heads(name, trained, tmp_path):
    recipe, kept = trained(name)
    assert kept["objective"]["losses"] == recipe["losses"]
    made = (load_medusa if "medusa" in name else load_hydra)(tmp_path / "out")
    assert (len(made.heads), made.num_layers) == (recipe["num_heads"], recipe["num_layers"])
    assert (getattr(made, "prefix", None) is not None) == recipe.get("prefix", False)


@pytest.mark.parametrize("name", ["train_eagle", "train_eagle_small"])
def test_a_recipe_trains_an_eagle_head(name, trained, target, tmp_path):
    recipe, kept = trained(name)
    assert kept["draft"]["unrolls"] == recipe["unrolls"]
    made = load_eagle(tmp_path / "out", AutoConfig.from_pretrained(target))
    assert made.features == ("layer:2", "layer:6", "layer:9")
    assert made.ids_V is None  # the target has fewer tokens


# One of them in every run; the others follow the same lines.
@pytest.mark.parametrize(
    "name",
    [
        "train_sft_small",
        pytest.param("train_soft_small", marks=pytest.mark.slow),
        pytest.param("train_distil_small", marks=pytest.mark.slow),
        pytest.param("train_medusa_small", marks=pytest.mark.slow),
        pytest.param("train_hydra_small", marks=pytest.mark.slow),
        pytest.param("train_eagle_small", marks=pytest.mark.slow),
    ],
)
def test_the_small_script_is_the_documented_way_in(script, name, target, chats, tmp_path):
    words = ["--max_steps", "2", "--minutes", "null", "--text.cache", tmp_path / "cache", *TINY]
    done = script(name, target, chats, tmp_path / "out", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "run.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("wrong", [["--optim.lrr", "1"], ["--optim.lr", "fast"], ["--text.split_by", "length"]])
def test_unknown_and_impossible_options_are_one_line_and_exit_code_2(wrong, target, chats, tmp_path, capsys):
    words = ["train", "sft", "--target", str(target), "--data", str(chats), "--out", str(tmp_path / "o"),
             "--num_layers", "2", *wrong]  # fmt: skip
    assert run(words) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_help_of_soft_tells_every_option():
    assert "exit_weights" in parameters(soft)
    assert set(parameters(sft)) <= set(parameters(soft))


class LastExit:
    """Cross-entropy of the whole draft, times `factor`: an objective that no file of draftsmith knows."""

    whole_draft = False

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def exits(self, num_layers: int) -> list[int]:
        return [num_layers]

    def begin(self, run: TrainContext) -> None:
        pass

    def __call__(self, draft: ExitStates, batch: dict[str, torch.Tensor]) -> LossSums:
        (states_ND,), labels_N = draft(batch)
        logits_NV = draft.head(states_ND).float()
        loss = self.factor * torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum")
        return LossSums(loss, loss.detach()[None])


def test_an_objective_of_ones_own_is_named_by_its_class_path_in_a_recipe(target, chats, tmp_path, monkeypatch, capsys):
    module = types.ModuleType("my_objectives")
    module.LastExit = LastExit
    monkeypatch.setattr(LastExit, "__module__", "my_objectives")
    monkeypatch.setitem(sys.modules, "my_objectives", module)
    recipe = tmp_path / "mine.yaml"
    named = {"class_path": "my_objectives.LastExit", "init_args": {"factor": 0.5}}
    recipe.write_text(yaml.safe_dump({"num_layers": 2, "max_steps": 2, "objective": named}))
    words = ["train", "draft", "--config", str(recipe), "--target", str(target), "--data", str(chats), "--out",
             str(tmp_path / "out"), "--text.cache", str(tmp_path / "cache"), *TINY]  # fmt: skip
    assert run([*words, "--objective.init_args.factor", "2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["max_steps"] == 2
    assert facts["settings"]["objective"] == {"name": "LastExit", "factor": 2.0}
    assert run([*words, "--objective", "my_objectives.Missing", "--out", str(tmp_path / "other")]) == 2
    assert "my_objectives.Missing" in capsys.readouterr().err
