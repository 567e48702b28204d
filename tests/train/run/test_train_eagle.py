"""Whole runs that train EAGLE heads: what they write and refuse, and that a kill changes nothing."""

import csv
import json
import random
from pathlib import Path

import pytest
from safetensors.torch import load_file

from draftsmith.infer.heads.folders import load_eagle, trained_for
from draftsmith.infer.models.hf_target import model_fingerprint
from draftsmith.infer.models.load import load_model
from draftsmith.infer.text.templates import load_tokenizer
from draftsmith.recipes.cli.main import run


def command(target, data, out, *more):
    words = [
        "train", "eagle", "--target", target, "--data", data, "--out", out,
        "--unrolls", "2", "--draft_vocab", "60", "--noise", "0.1", "--max_steps", "16", "--text.max_length", "128",
        "--text.held_out", "0.2", "--text.cache", Path(out).parent / "cache", "--optim.batch_size", "4",
        "--optim.micro_batch_size", "2", "--optim.lr", "1e-2", "--machine.workers", "0", "--machine.precision",
        "32-true", "--machine.device", "cpu", "--watch.save_every", "2", "--watch.val_every", "0",
        "--watch.val_prompts", "0", *more,
    ]  # fmt: skip
    return list(map(str, words))


def rows(out):
    with (out / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_a_head_that_loads_and_learned(target_folder, chats, tmp_path, capsys):
    out = tmp_path / "out"
    more = ["--watch.val_prompts", "2", "--watch.val_new_tokens", "8", "--norm_output", "--max_steps", "12", "--json",
            "--machine.gradient_checkpointing", "true"]  # fmt: skip
    assert run(command(target_folder, chats, out, *more)) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(told["results"]) == {"step", "loss_unroll_0", "loss_unroll_1", "accepted_length"}
    assert told["results"]["accepted_length"] >= 1
    assert told["settings"]["draft"]["norm_output"] is True
    target, _ = load_model(str(target_folder), device="cpu")
    made = load_eagle(out, target.config)
    assert made.design.norm_output
    assert len(made.ids_V) == 60
    assert set(load_tokenizer(str(target_folder)).all_special_ids) <= set(made.ids_V.tolist())
    assert trained_for(out).fingerprint == model_fingerprint(target)
    held_out = [row for row in rows(out) if row["kind"] == "held_out"]
    for column in ("loss_unroll_0", "loss_unroll_1"):
        assert float(held_out[-1][column]) < 0.8 * float(held_out[0][column])


def test_killed_it_ends_as_if_it_had_not_been(target_folder, chats, tmp_path, kill_at_step, capsys):
    """With noise, and states from a cache."""
    whole, killed, features = tmp_path / "whole", tmp_path / "killed", ["--features", tmp_path / "features"]
    assert run(command(target_folder, chats, whole, *features)) == 0
    words = command(target_folder, chats, killed, *features)
    kill_at_step(words, killed, random.randrange(3, 10))
    capsys.readouterr()
    assert run(words) == 0
    assert "resuming from step-" in capsys.readouterr().err
    ours, theirs = load_file(killed / "model.safetensors"), load_file(whole / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lora_rank", "4"], "unknown option --lora_rank"),
        (["--unrolls", "0"], "--unrolls 0: it must be at least 1"),
        (["--decay", "2"], "--decay 2.0: it must be above 0 and at most 1"),
        (["--draft_vocab", "3"], "draft_vocab 3: the target has 3 special and stop tokens"),
        (["--losses", "{cross_entropy: 1}"], "cross_entropy learns the text's tokens"),
        (["--layers", "2", "7"], "--layers [2, 7]: the target's last state is before layer 4"),
        (["--outside", "weigh"], "--outside takes keep or drop"),
        (["--init", "missing"], "--init missing: neither fresh nor the folder of a head"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(more, said, target_folder, chats, tmp_path, capsys):
    assert run(command(target_folder, chats, tmp_path / "out", *more)) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out" / "run.json").exists()
