"""Two processes over gloo, of one machine or of two, train to the losses of one process with the doubled batch."""

import csv
import json
import socket
import subprocess
import sys

import processes
import pytest

from draftsmith.recipes.cli import main


def command(target, data, out, *more):
    words = [
        "train", "soft", "--target", target, "--data", data, "--out", out,
        "--num_layers", "2", "--exits", "[1, 2]", "--max_steps", "6",
        "--text.max_length", "128", "--text.held_out", "0.2",
        "--text.cache", out.parent / "cache", "--optim.batch_size", "4", "--optim.lr", "1e-3", "--machine.workers", "0",
        "--machine.precision", "32-true", "--machine.device", "cpu", "--watch.val_every", "3",
        "--watch.val_prompts", "1",
        "--watch.val_new_tokens", "4", *more,
    ]  # fmt: skip
    return list(map(str, words))


def rows(out):
    with (out / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def run(*words):
    """Also the process of the second rank, which does not affect the exit code, must not have failed."""
    command_line = [sys.executable, "-m", "draftsmith.recipes", *command(*words, "--json")]
    done = subprocess.run(command_line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["max_steps"] == 6
    return rows(words[2])


@pytest.fixture(scope="module")
def one(target_folder, chats, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "one"
    assert main.run(command(target_folder, chats, out, "--optim.micro_batch_size", "4")) == 0
    return rows(out)


def check_equal(one, two):
    assert [row["kind"] for row in one] == [row["kind"] for row in two]
    for mine, other in zip(one, two):
        for name in ("loss", "loss_exit_1", "loss_exit_2"):
            assert float(other[name]) == pytest.approx(float(mine[name]), rel=1e-5)
        if mine["kind"] == "train":
            assert float(other["grad_norm"]) == pytest.approx(float(mine["grad_norm"]), rel=1e-4)


def test_two_gloo_processes_train_to_the_losses_of_one(one, target_folder, chats, tmp_path):
    two = run(target_folder, chats, tmp_path / "two", "--optim.micro_batch_size", "1", "--devices", "2")
    check_equal(one, two)


def test_two_nodes_over_gloo_train_to_the_losses_of_one(one, target_folder, chats, tmp_path):
    """Two nodes as a cluster would start them, both on this machine: one process each, told apart by NODE_RANK."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "nodes"
    words = command(target_folder, chats, out, "--optim.micro_batch_size", "2", "--num_nodes", "2")
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    nodes = [
        processes.Started(processes.COMMAND, *words, env={**where, "NODE_RANK": str(number)}) for number in range(2)
    ]
    try:
        codes = [node.wait() for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    told = [node.stderr for node in nodes]
    assert codes == [0, 0], told
    assert "held-out loss" in told[0]
    assert "held-out loss" not in told[1]
    check_equal(one, rows(out))
    assert json.loads((out / "run.json").read_text())["state"] == "finished"
