"""Two processes over gloo train to the losses of one process with the doubled batch."""

import csv
import subprocess
import sys

import pytest


def run(target, data, out, *more):
    words = [
        sys.executable, "-m", "draftsmith.recipes", "train", "soft", "--target", target, "--data", data, "--out", out,
        "--num_layers", "2", "--exits", "[1, 2]", "--max_steps", "6",
        "--text.max_length", "128", "--text.held_out", "0.2",
        "--text.cache", out.parent / "cache", "--optim.batch_size", "4", "--optim.lr", "1e-3", "--machine.workers", "0",
        "--machine.precision", "32-true", "--machine.device", "cpu", "--watch.val_every", "3",
        "--watch.val_prompts", "1",
        "--watch.val_new_tokens", "4", *more,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with (out / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_two_gloo_processes_train_to_the_losses_of_one(target_folder, chats, tmp_path):
    one = run(target_folder, chats, tmp_path / "one", "--optim.micro_batch_size", "4")
    two = run(target_folder, chats, tmp_path / "two", "--optim.micro_batch_size", "1", "--devices", "2")
    assert [row["kind"] for row in one] == [row["kind"] for row in two]
    for mine, other in zip(one, two):
        for name in ("loss", "loss_exit_1", "loss_exit_2"):
            assert float(other[name]) == pytest.approx(float(mine[name]), rel=1e-5)
        if mine["kind"] == "train":
            assert float(other["grad_norm"]) == pytest.approx(float(mine["grad_norm"]), rel=1e-4)
