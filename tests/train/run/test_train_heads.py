"""Whole runs that train Medusa and Hydra heads: what they learn, write and refuse, and that a kill changes nothing."""

import csv
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_chats import write_jsonl

from draftsmith.infer.heads.folders import load_hydra, load_medusa, trained_for
from draftsmith.infer.models.hf_target import model_fingerprint
from draftsmith.infer.models.load import load_model
from draftsmith.recipes.cli.main import run
from draftsmith.train.drafts.hydra import HydraBuilder
from draftsmith.train.drafts.medusa import MedusaBuilder
from draftsmith.train.objectives.future_tokens import FutureTokens
from draftsmith.train.run.config import HeadsConfig, Machine, Optim, Text, Watch
from draftsmith.train.run.run import train_heads

QUIET = Watch(val_every=0, val_prompts=0, save_every=1000)
HEADS = 3


@pytest.fixture(scope="module")
def make_plan(target_folder, chats, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")

    def make(text=None, optim=None, **changes):
        settings = {
            "target": str(target_folder), "data": [str(chats)], "max_steps": 4, "watch": QUIET,
            "out": str(tmp_path_factory.mktemp("run") / "out"),
            "text": Text(**{"max_length": 128, "held_out": 0.2, "cache": str(cache), **(text or {})}),
            "optim": Optim(**{"lr": 1e-2, "batch_size": 4, **(optim or {})}),
            "machine": Machine(device="cpu", precision="32-true", workers=0),
        }  # fmt: skip
        return HeadsConfig(**{**settings, **changes})

    return make


def losses(plan):
    with open(f"{plan.out}/metrics.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["kind"] == "train"]


def weights(folder):
    (path,) = Path(folder).glob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize(
    ("builder", "load"),
    [(MedusaBuilder(HEADS, num_layers=2), load_medusa), (HydraBuilder(HEADS, num_layers=2, prefix=True), load_hydra)],
    ids=["medusa", "hydra"],
)
def test_a_run_leaves_heads_that_load_and_a_record_of_how_they_were_made(make_plan, builder, load, target_folder):
    plan = make_plan(watch=Watch(val_every=0, val_prompts=2, val_new_tokens=8))
    facts = train_heads(FutureTokens(), plan, builder)
    target, _ = load_model(str(target_folder), device="cpu")
    made = load(plan.out, target.config)
    assert (len(made.heads), made.num_layers) == (HEADS, 2)
    assert trained_for(plan.out).fingerprint == model_fingerprint(target)
    assert facts["state"] == "finished"
    assert facts["heads"] == [1, 2, 3]
    assert facts["settings"]["draft"] == {"name": type(builder).__name__, **vars(builder)}
    assert facts["settings"]["objective"]["losses"] == {"forward_kl": 1.0}
    assert set(facts["results"]) == {"step", "loss_head_1", "loss_head_2", "loss_head_3", "accepted_length"}
    assert facts["results"]["accepted_length"] >= 1
    assert "lora_rank" not in facts["settings"]
    assert Path(plan.out, "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert not Path(plan.out, "resume").exists()


@pytest.mark.parametrize("loss", ["cross_entropy", "forward_kl", "total_variation", "sampled"])
@pytest.mark.parametrize("builder", [MedusaBuilder(HEADS), HydraBuilder(HEADS)], ids=["medusa", "hydra"])
def test_heads_overfit_one_batch(make_plan, builder, loss, tmp_path):
    text = {"max_length": 64, "held_out": 0.0, "limit": 1, "cache": str(tmp_path)}
    plan = make_plan(text, {"batch_size": 1, "warmup": 0.0}, max_steps=60)
    train_heads(FutureTokens({loss: 1.0}), plan, builder)
    assert losses(plan)[-1] < 0.25 * losses(plan)[0]


def test_muon_and_accumulation_train_heads_too(make_plan):
    whole = make_plan(optim={"micro_batch_size": 4})
    train_heads(FutureTokens(), whole, HydraBuilder(HEADS))
    parts = make_plan(optim={"micro_batch_size": 1})
    train_heads(FutureTokens(), parts, HydraBuilder(HEADS))
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    muon = make_plan(optim={"name": "muon", "lr": 3e-3}, max_steps=20)
    train_heads(FutureTokens(), muon, MedusaBuilder(HEADS))
    assert losses(muon)[-1] < 0.8 * losses(muon)[0]


@pytest.fixture(scope="module")
def successor(target_folder, tmp_path_factory):
    """A target whose next token is a function of the newest one (the letter after it), and text that follows it."""
    folder = tmp_path_factory.mktemp("planted")
    model, tokenizer = load_model(str(target_folder), dtype="float32", device="cpu")
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "abcdefghijklmnopqrstuvwxyz"]
    start = tokenizer.convert_tokens_to_ids("<|assistant|>")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        embedded = torch.nn.functional.normalize(model.model.embed_tokens.weight, dim=-1)
        for at, after in zip([*letters, start], [*letters[1:], letters[0], letters[0]]):
            model.lm_head.weight[after] += 4 * embedded[at]
    model.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    alphabet = "abcdefghijklmnopqrstuvwxyz" * 2
    rows = [{"messages": [{"role": "user", "content": f"go {i}"}, {"role": "assistant", "content": alphabet}]}
            for i in range(20)]  # fmt: skip
    return str(folder / "target"), str(write_jsonl(folder / "chats.jsonl", rows))


@pytest.mark.parametrize("builder", [MedusaBuilder(HEADS), HydraBuilder(HEADS, prefix=True)], ids=["medusa", "hydra"])
def test_of_a_text_that_can_be_foretold_every_draft_is_accepted_whole(make_plan, builder, successor, tmp_path):
    """By infer's own loop. An answer's first step has no draft, because the target has not read the prompt's end."""
    target, data = successor
    text = {"cache": str(tmp_path), "template": "chat", "held_out": 0.3}
    plan = make_plan(
        text, {"lr": 2e-2}, target=target, data=[data], max_steps=40,
        watch=Watch(val_every=0, val_prompts=3, val_new_tokens=1 + 4 * (HEADS + 1)),
    )  # fmt: skip
    facts = train_heads(FutureTokens({"cross_entropy": 1.0}, decay=1.0), plan, builder)
    assert facts["results"]["accepted_length"] == (1 + 4 * (HEADS + 1)) / (1 + 4)


def test_cached_features_train_to_the_weights_of_live_ones(make_plan, tmp_path):
    live, cached = make_plan(), make_plan()
    train_heads(FutureTokens(), live, HydraBuilder(HEADS, prefix=True))
    train_heads(
        FutureTokens(features=str(tmp_path / "f"), features_dtype="float32"), cached, HydraBuilder(3, prefix=True)
    )
    assert losses(cached) == pytest.approx(losses(live), rel=1e-5)
    for name, weight in weights(live.out).items():
        torch.testing.assert_close(weights(cached.out)[name], weight, rtol=1e-3, atol=1e-4)


def test_heads_go_on_from_ones_that_were_trained_before(make_plan):
    first = make_plan(max_steps=20)
    train_heads(FutureTokens(), first, MedusaBuilder(HEADS))
    second = make_plan(max_steps=1, optim={"lr": 1e-6})
    train_heads(FutureTokens(), second, MedusaBuilder(HEADS, init=first.out))
    assert losses(second)[0] < 0.8 * losses(first)[0]
    with pytest.raises(
        ValueError, match="has 3 heads of 1 blocks, and trained heads keep their shape: give --num_heads"
    ):
        train_heads(FutureTokens(), make_plan(), MedusaBuilder(2, init=first.out))
    with pytest.raises(ValueError, match="is a folder of medusa heads, not of hydra"):
        train_heads(FutureTokens(), make_plan(), HydraBuilder(HEADS, init=first.out))


def command(target, data, out, *more):
    words = [
        "train", "hydra", "--target", target, "--data", data, "--out", out,
        "--num_heads", "2", "--dropout", "0.2", "--prefix", "--max_steps", "16", "--text.max_length", "128",
        "--text.held_out", "0.2", "--text.cache", Path(out).parent / "cache", "--optim.batch_size", "4",
        "--optim.micro_batch_size", "2", "--optim.lr", "1e-2", "--machine.workers", "0", "--machine.precision",
        "32-true", "--machine.device", "cpu", "--watch.save_every", "2", "--watch.val_every", "0",
        "--watch.val_prompts", "0", *more,
    ]  # fmt: skip
    return list(map(str, words))


def test_killed_it_ends_as_if_it_had_not_been(target_folder, chats, tmp_path, kill_at_step, capsys):
    """With dropout, and states from a cache."""
    whole, killed, features = tmp_path / "whole", tmp_path / "killed", ["--features", tmp_path / "features"]
    assert run(command(target_folder, chats, whole, *features)) == 0
    words = command(target_folder, chats, killed, *features)
    kill_at_step(words, killed, random.randrange(3, 10))
    capsys.readouterr()
    assert run(words) == 0
    assert "resuming from step-" in capsys.readouterr().err
    ours, theirs = weights(killed), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.slow
def test_two_gloo_processes_train_to_the_losses_of_one(target_folder, chats, tmp_path):
    found = []
    for name, devices in (("one", "1"), ("two", "2")):
        more = ["--max_steps", "6", "--dropout", "0", "--devices", devices, "--optim.micro_batch_size", "1"]
        done = subprocess.run(
            [sys.executable, "-m", "draftsmith.recipes", *command(target_folder, chats, tmp_path / name, *more)],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        with (tmp_path / name / "metrics.csv").open(newline="") as file:
            found.append([float(row["loss"]) for row in csv.DictReader(file)])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lora_rank", "4"], "unknown option --lora_rank"),
        (["--num_heads", "0"], "--num_heads 0: it must be at least 1"),
        (["--dropout", "1"], "--dropout 1.0: it must be at least 0 and below 1"),
        (["--strategy", "deepspeed_stage_2"], "strategy deepspeed_stage_2 needs CUDA devices"),
        (["--machine.gradient_checkpointing", "true"], "gradient checkpointing is for drafts of many layers"),
        (["--features", "run.json"], "run.json is a file: features are `live` or the folder of a cache"),
        (["--init", "missing"], "missing"),
        (["--features_dtype", "int8"], "--features_dtype takes bfloat16 or float32"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(more, said, target_folder, chats, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    assert run(command(target_folder, chats, tmp_path / "out", *more)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert said in last
    assert not (tmp_path / "out" / "run.json").exists()


def test_json_on_the_last_line_has_what_a_script_needs(target_folder, chats, tmp_path, capsys):
    words = command(target_folder, chats, tmp_path / "out", "--max_steps", "1", "--json")
    assert run(words) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found) == {"max_steps", "results", "train_seconds", "settings"}
