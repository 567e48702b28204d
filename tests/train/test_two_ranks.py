"""Two processes over gloo, of one machine or of two, train to the losses of one process with the doubled batch."""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

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


def losses(out):
    return [float(row["loss"]) for row in rows(out)]


@pytest.mark.slow
def test_two_ranks_train_an_eagle_head_to_the_losses_of_one_with_noise(target_folder, chats, tmp_path):
    """Each row has noise of its own, and unrolls learn other numbers of tokens in each micro-batch."""
    found = []
    for name, more in (("one", ["--optim.micro_batch_size", "4"]), ("two", ["--devices", "2"])):
        words = command(target_folder, chats, tmp_path / name, "--optim.micro_batch_size", "1", *more)
        for option in ("--num_layers", "--exits"):
            at = words.index(option)
            del words[at : at + 2]
        words[1] = "eagle"
        done = subprocess.run(
            [sys.executable, "-m", "draftsmith.recipes", *words, "--unrolls", "2", "--noise", "0.2"],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append(losses(tmp_path / name))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[0][0] != pytest.approx(found[0][-1], rel=1e-2)


class Ranks:
    """`draftsmith WORDS` on several ranks, and its stderr."""

    def __init__(self, words, folder):
        self.stderr = folder / "stderr"
        with self.stderr.open("w") as stderr:
            self.first = subprocess.Popen(
                [sys.executable, "-m", "draftsmith.recipes", *words], stderr=stderr, start_new_session=True
            )

    def others(self):
        """The processes of the other ranks."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                environ = path.read_bytes().split(b"\0")
                group = os.getpgid(int(path.parent.name))
                zombie = path.with_name("stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
            except OSError:
                continue
            ranked = any(each.startswith(b"LOCAL_RANK=") for each in environ)
            if group == self.first.pid and ranked and not zombie and int(path.parent.name) != self.first.pid:
                found.append(int(path.parent.name))
        return found

    def wait_for(self, ready):
        until = time.monotonic() + 120
        while time.monotonic() < until and self.first.poll() is None:
            if ready():
                return
            time.sleep(0.005)
        raise AssertionError(f"it ended before it could be killed: {self.stderr.read_text()}")

    def ended(self, limit):
        """Wait for the end of all; stderr."""
        until = time.monotonic() + limit
        while time.monotonic() < until and (self.first.poll() is None or self.others()):
            time.sleep(0.05)
        left = self.others() + ([self.first.pid] if self.first.poll() is None else [])
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        self.first.wait()
        assert not left, f"still there after {limit} s: {self.stderr.read_text()}"
        return self.stderr.read_text()


def steps(out):
    path = out / "metrics.csv"
    return path.read_text().count(",train,") if path.exists() else 0


LONG = ["--max_steps", "24", "--watch.save_every", "3", "--watch.val_every", "0", "--watch.val_prompts", "0"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_killed_on_two_ranks_it_resumes_on_one_and_on_four_as_if_it_had_not_been(
    strategy, target_folder, chats, tmp_path
):
    """The state is that of a step whose micro-batches would not fill another number of steps on one rank."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main.run(command(target_folder, chats, whole, *LONG, "--optim.micro_batch_size", "4")) == 0
    run_on = lambda devices: command(target_folder, chats, out, *LONG, "--optim.micro_batch_size", "1",  # noqa: E731
                                     "--devices", devices, "--strategy", strategy)  # fmt: skip
    ranks = Ranks(run_on(2), tmp_path)
    ranks.wait_for(lambda: steps(out) >= 4)
    os.kill(ranks.others()[0], signal.SIGKILL)
    said = ranks.ended(10)
    assert ranks.first.returncode == 1
    assert "Traceback" not in said
    told = [line for line in said.splitlines() if line.startswith("draftsmith train: ")]
    assert len(told) == 1
    (state,) = (out / "resume").glob("step-*.ckpt")
    step = int(state.stem.removeprefix("step-"))
    assert f"rank 1 was killed by signal SIGKILL after step {step}; run the same command again to resume" in told[0]
    assert 0 < step < 24
    shutil.copytree(out, tmp_path / "kept")

    for devices in (1, 4):
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "kept", out)
        done = subprocess.run(
            [sys.executable, "-m", "draftsmith.recipes", *run_on(devices)], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert f"resuming from {state.name}" in done.stderr
        assert losses(out) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.slow
def test_where_the_first_rank_is_killed_the_second_ends_with_one_line(target_folder, chats, tmp_path):
    out = tmp_path / "out"
    ranks = Ranks(command(target_folder, chats, out, *LONG, "--optim.micro_batch_size", "2", "--devices", 2), tmp_path)
    ranks.wait_for(lambda: steps(out) >= 4)
    ranks.first.kill()
    said = ranks.ended(10)
    assert "Traceback" not in said
    assert (
        [line for line in said.splitlines() if line.startswith("draftsmith train: ")]
        == [line for line in said.splitlines() if "rank 0 has died after step" in line]
        != []
    )


@pytest.mark.slow
def test_a_rank_that_dies_before_the_ranks_have_met_ends_the_other(target_folder, chats, tmp_path):
    out = tmp_path / "out"
    ranks = Ranks(command(target_folder, chats, out, *LONG, "--optim.micro_batch_size", "2", "--devices", 2), tmp_path)
    ranks.wait_for(ranks.others)
    os.kill(ranks.others()[0], signal.SIGKILL)
    said = ranks.ended(10)
    assert "draftsmith train: rank 1 was killed by signal SIGKILL before the first step was finished" in said
    assert "run the same command again to start over" in said


@pytest.mark.parametrize(
    ("more", "environment", "said"),
    [
        (
            ["--num_nodes", "2"],
            {},
            "--num_nodes 2: MASTER_ADDR, MASTER_PORT, NODE_RANK not set; start the command once",
        ),
        (["--devices", "2"], {"MASTER_PORT": "many"}, "MASTER_PORT=many: give the number of a free port"),
        (["--devices", "2"], {"MASTER_PORT": "used"}, "cannot be used (Address already in use): give another"),
        (["--devices", "2"], {"LOCAL_RANK": "0", "WORLD_SIZE": "4"}, "the launcher started 4 ranks, and --devices 2"),
        (["--devices", "3"], {}, "batch_size 4 is not a multiple of the 3 devices"),
    ],
)
def test_ranks_that_could_not_meet_are_one_line(
    more, environment, said, target_folder, chats, tmp_path, capsys, monkeypatch
):
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("", 0)) as taken:
        for name, value in environment.items():
            monkeypatch.setenv(name, str(taken.getsockname()[1]) if value == "used" else value)
        words = command(target_folder, chats, tmp_path / "out", "--optim.micro_batch_size", "0", *more)
        assert main.run(words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("draftsmith")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "out").exists()
