"""Whole runs in this process: the loss is per token of the step however it is cut up, and every objective learns."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from draftsmith.train.objectives.sft import SFT
from draftsmith.train.objectives.soft import SoFT
from draftsmith.train.run.callbacks import AtSteps
from draftsmith.train.run.config import STRATEGIES, Machine, Optim, Text, TrainConfig, Watch, resolved
from draftsmith.train.run.run import train_draft

QUIET = Watch(val_every=0, val_prompts=0, save_every=1000)


@pytest.fixture(scope="module")
def make_plan(target_folder, chats, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")

    def make(out=None, optim=None, machine=None, text=None, **changes):
        settings = {
            "target": str(target_folder), "data": [str(chats)], "num_layers": 2, "max_steps": 4, "watch": QUIET,
            "out": str(out or tmp_path_factory.mktemp("run") / "out"),
            "text": Text(max_length=128, held_out=0.2, cache=str(cache), **text or {}),
            "optim": Optim(**{"lr": 1e-3, "batch_size": 4, **(optim or {})}),
            "machine": Machine(**{"device": "cpu", "precision": "32-true", "workers": 0, **(machine or {})}),
        }  # fmt: skip
        return TrainConfig(**{**settings, **changes})

    return make


def losses(plan):
    with open(f"{plan.out}/metrics.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["kind"] == "train"]


def weights(plan):
    return load_file(f"{plan.out}/model.safetensors")


def test_accumulation_and_gradient_checkpointing_change_nothing_but_rounding(make_plan):
    whole = make_plan(optim={"micro_batch_size": 4})
    train_draft(SoFT([1, 2]), whole)
    others = [make_plan(optim={"micro_batch_size": 1}), make_plan(machine={"gradient_checkpointing": True})]
    for plan in others:
        train_draft(SoFT([1, 2]), plan)
        assert losses(plan) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.parametrize(
    ("objective", "optim"),
    [(SFT(), {}), (SoFT([1, 2]), {}), (SoFT([1, 2], [3, 1]), {"name": "muon", "weight_decay": 0.01})],
    ids=["sft", "soft", "soft-muon"],
)
def test_every_objective_overfits_one_batch(make_plan, objective, optim):
    plan = make_plan(optim={"lr": 1e-2, "batch_size": 1, "warmup": 0.0, **optim}, max_steps=60, text={"limit": 2})
    train_draft(objective, plan)
    assert losses(plan)[-1] < 0.3 < 3 < losses(plan)[0]


def test_loss_per_exit_is_that_of_the_exit_as_a_model_of_its_own(make_plan):
    plan = make_plan(max_steps=1, optim={"lr": 0.0}, watch=Watch(val_every=0, val_prompts=2, val_new_tokens=8))
    facts = train_draft(SoFT([1, 2]), plan)
    alone = make_plan(num_layers=1, max_steps=1, optim={"lr": 0.0}, watch=plan.watch)
    short = train_draft(SFT(), alone)
    for name in ("loss_exit_1", "accepted_length_exit_1"):
        assert facts["results"][name] == pytest.approx(short["results"][name], rel=1e-6)


def test_what_is_frozen_stays_the_targets_and_the_rest_moves(make_plan, target_folder):
    plan = make_plan(freeze=("embeddings", "head"))
    train_draft(SFT(), plan)
    ours, target = weights(plan), load_file(target_folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert ours[name].equal(target[name])
    assert not ours["model.norm.weight"].equal(target["model.norm.weight"])
    with pytest.raises(ValueError, match="embeddings and head can"):
        train_draft(SFT(), make_plan(freeze=("norm",)))


def test_lora_is_merged_into_a_plain_model_and_leaves_embeddings_alone(make_plan, target_folder):
    plan = make_plan(lora_rank=4, optim={"lr": 1e-2})
    train_draft(SoFT([1, 2]), plan)
    ours, target = weights(plan), load_file(target_folder / "model.safetensors")
    assert not [name for name in ours if "lora" in name or "base_layer" in name]
    assert ours["model.embed_tokens.weight"].equal(target["model.embed_tokens.weight"])
    assert not ours["model.layers.0.mlp.up_proj.weight"].equal(target["model.layers.0.mlp.up_proj.weight"])


def test_minutes_measure_the_first_steps_and_fix_max_steps_once(make_plan):
    plan = make_plan(minutes=0.05, max_steps=None)
    facts = train_draft(SFT(), plan)
    assert facts["max_steps"] > 8
    assert len(losses(plan)) == facts["max_steps"]
    assert facts["train_seconds"] < 15


def test_run_json_tells_how_the_model_was_made(make_plan):
    plan = make_plan()
    train_draft(SoFT([1, 2]), plan)
    facts = json.loads(Path(plan.out, "run.json").read_text())
    assert facts["state"] == "finished"
    assert facts["settings"]["objective"] == {"name": "SoFT", "exits": [1, 2], "weights": [0.5, 0.5]}
    assert facts["data"]["rendering"]["loss_tokens"] > 0
    assert {"git", "hardware", "versions", "seed", "command"} <= facts.keys()
    assert Path(plan.out, "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"strategy": "fsdp_cpu_offload"}, "fsdp_cpu_offload needs CUDA devices; on a CPU use fsdp or ddp"),
        ({"strategy": "deepspeed_stage_2"}, "deepspeed_stage_2 needs CUDA devices"),
        ({"strategy": "fsdp", "machine": {"precision": "64-true"}}, "fsdp trains in bf16-mixed, bf16-true or 32-true"),
        ({"strategy": "fsdp", "watch": Watch()}, "validation decodes with the whole draft, and fsdp shards it"),
        ({"strategy": "zero"}, "unknown strategy"),
        ({"devices": 3}, "batch_size 4 is not a multiple of the 3"),
        ({"optim": {"micro_batch_size": 3}}, "micro_batch_size 3 does not divide"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_one_line(make_plan, changes, told):
    with pytest.raises(ValueError, match=told) as error:
        resolved(make_plan(**changes))
    assert "\n" not in str(error.value)


def test_ctrl_c_tells_how_to_go_on_and_going_on_ends_as_if_it_had_not_been(make_plan, monkeypatch):
    plan = make_plan(watch=Watch(val_every=0, val_prompts=0, save_every=1))
    log = AtSteps._log_step

    def interrupted(self, *args):
        log(self, *args)
        if self._step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(AtSteps, "_log_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="run the same command again"):
        train_draft(SFT(), plan)
    monkeypatch.undo()
    train_draft(SFT(), plan)
    whole = make_plan()
    train_draft(SFT(), whole)
    assert losses(plan) == losses(whole)


def test_curves_also_go_to_tensorboard_when_asked(make_plan):
    plan = make_plan(watch=Watch(val_every=0, val_prompts=0, loggers=["tensorboard"]))
    train_draft(SFT(), plan)
    assert list(Path(plan.out, "tensorboard").glob("events.*"))
    with pytest.raises(ValueError, match="unknown logger 'board'"):
        train_draft(SFT(), make_plan(watch=Watch(val_every=0, val_prompts=0, loggers=["board"])))


def test_curves_also_go_to_wandb_which_keeps_them_here_when_told_to(make_plan, target_folder, chats, tmp_path):
    pytest.importorskip("wandb")
    plan = make_plan()
    words = [sys.executable, "-m", "draftsmith.recipes", "train", "soft", "--target", plan.target, "--data", *plan.data,
             "--out", tmp_path / "out", "--num_layers", "2", "--exits", "1", "2", "--max_steps", "3",
             "--text.max_length", "128", "--text.held_out", "0.2", "--text.cache", tmp_path / "cache",
             "--optim.batch_size", "2", "--machine.device", "cpu", "--machine.workers", "0",
             "--watch.val_prompts", "0", "--watch.loggers", "wandb"]  # fmt: skip
    away = {"WANDB_MODE": "offline", "WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path)}
    done = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, timeout=240, env={**os.environ, **away}
    )
    assert done.returncode == 0, done.stderr
    (kept,) = (tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb")
    written = kept.read_bytes()
    for name in (b"train/loss_exit_1", b"train/lr", b"held_out/loss_exit_2"):
        assert name in written


@pytest.mark.parametrize(("logger", "extra"), [("wandb", "wandb"), ("tensorboard", "train")])
def test_a_logger_that_is_not_installed_is_refused_before_anything_is_written(make_plan, monkeypatch, logger, extra):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == logger else find(name, *more))
    plan = make_plan(watch=Watch(loggers=[logger]))
    with pytest.raises(ValueError, match=rf"the logger {logger} needs the extra .*draftsmith\[{extra}\]") as error:
        train_draft(SFT(), plan)
    assert "\n" not in str(error.value)
    assert not Path(plan.out).exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own, about itself
def test_compiled_layers_train_to_the_same_losses(make_plan):
    plain, compiled = make_plan(), make_plan(machine={"compile": True})
    for plan in (plain, compiled):
        train_draft(SoFT([1, 2]), plan)
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)


@pytest.mark.parametrize("exits", [[1], [2, 1, 4], [0, 4], [1, 1, 4], [1, 5]])
def test_exits_that_a_draft_cannot_have_are_refused(exits):
    with pytest.raises(ValueError, match="exits"):
        SoFT(exits).exits(4)


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name not in ("auto", "ddp")])
def test_sharded_strategies_train_to_the_losses_of_one_device(make_plan, strategy):
    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    machine = {"device": "cuda", "precision": "32-true"}
    single, sharded = make_plan(machine=machine), make_plan(machine=machine, strategy=strategy)
    for plan in (single, sharded):
        train_draft(SoFT([1, 2]), plan)
    assert losses(sharded) == pytest.approx(losses(single), rel=1e-4)
    for name, weight in weights(single).items():
        torch.testing.assert_close(weights(sharded)[name], weight, rtol=1e-3, atol=1e-5)
