"""Ranks that are killed, in a pass over a prompt and in a step, end the others within seconds, with one line."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
import torch
from over_ranks import IN_PREFILL, IN_STEPS, LOAD, alive, children, saved, until
from tiny_models import tiny_model

# Over gloo; two CUDA devices are tried in tests/infer/models/tensor_parallel/test_two_devices.py.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="two ranks on the CPU: hide the CUDA devices")
# Seconds for all to end.
MOST_S = 10.0


@pytest.fixture
def started(tmp_path: Path) -> Iterator[object]:
    """Two ranks that repeat this work, once they have begun: rank 0's process, and the process of rank 1."""
    running = []

    def start(work: str) -> tuple[processes.Started, int]:
        folder = saved(tmp_path / "target", tiny_model("llama"), torch.float32)
        leader = processes.Started(LOAD + work, folder)
        running.append(leader)
        assert until(lambda: leader.stdout.count("again") > 5 or leader.poll() is not None, 120), leader.stderr
        assert leader.poll() is None, leader.stderr
        (follower,) = children(leader.pid)
        return leader, follower

    yield start
    for leader in running:
        leader.kill()


PREFILL, STEPS = pytest.param(IN_PREFILL, id="in prefill"), pytest.param(IN_STEPS, id="in a step")
SLOW_PREFILL = pytest.param(IN_PREFILL, id="in prefill", marks=pytest.mark.slow)
SLOW_STEPS = pytest.param(IN_STEPS, id="in a step", marks=pytest.mark.slow)


@pytest.mark.parametrize("work", [SLOW_PREFILL, STEPS])
def test_rank_0_ends_with_a_rank_that_is_killed(started, work):
    leader, follower = started(work)
    began = time.monotonic()
    os.kill(follower, signal.SIGKILL)
    assert leader.wait(MOST_S) == 1
    assert time.monotonic() - began < MOST_S
    assert leader.stderr == "draftsmith: the target is gone: rank 1 was ended by signal 9 (SIGKILL)\n"


@pytest.mark.parametrize("work", [PREFILL, SLOW_STEPS])
def test_a_rank_ends_with_rank_0(started, work):
    leader, follower = started(work)
    leader.kill()
    assert until(lambda: not alive(follower), MOST_S)
    assert leader.stderr == "draftsmith: rank 0 of the target is gone: the other ranks end\n"


@pytest.mark.slow
def test_an_idle_target_ends_with_a_rank_that_is_killed(started):
    leader, follower = started("print('again' * 9, flush=True)\nimport time\ntime.sleep(300)")
    os.kill(follower, signal.SIGKILL)
    assert leader.wait(MOST_S) == 1
    assert leader.stderr == "draftsmith: the target is gone: rank 1 was ended by signal 9 (SIGKILL)\n"


@pytest.mark.slow
def test_an_interrupt_waits_for_the_pass_and_the_ranks_go_on(started):
    """Ctrl-C in the middle of passes leaves both ranks at the same place: what follows is decoded as before."""
    leader, follower = started(INTERRUPTED)
    for _ in range(3):
        time.sleep(0.1)
        leader.send_signal(signal.SIGINT)
    assert leader.wait(60) == 0, leader.stderr
    assert leader.stdout.splitlines()[-1] == "3 interrupts, the same tokens: True"
    assert leader.stderr == ""
    assert until(lambda: not alive(follower), MOST_S)


INTERRUPTED = """
def decode(engine, row, interrupted):
    engine.add(row)
    while engine.busy:
        try:
            engine.step()
            if interrupted is not None:
                print("again", flush=True)
        except KeyboardInterrupt:
            interrupted.append(1)
    return row.new_ids

def row():
    return Row("0", [5, 6, 7], Settings(), Stops(400))

seen = []
with Engine(target, Empty()) as engine:
    wanted = None
    while len(seen) < 3:
        found = decode(engine, row(), seen)
    wanted = decode(engine, row(), None)
print(f"{len(seen)} interrupts, the same tokens: {found == wanted}")
"""


@pytest.mark.slow
def test_a_draft_whose_weights_are_damaged_is_one_line_and_ends_the_target(tmp_path: Path) -> None:
    target, draft = (saved(tmp_path / name, tiny_model("llama"), torch.float32) for name in ("target", "draft"))
    weights = tmp_path / "draft" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    done = processes.run(LOAD + DAMAGED, target, draft)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{draft} could not be loaded: model.safetensors is damaged or incomplete")


DAMAGED = """
from draftsmith.infer.drafters import SmallLM
target.tokenizer = None
try:
    SmallLM(sys.argv[2], tp=2).bind(target)
except ValueError as problem:
    print(problem)
assert target.shares.ranks.ended
"""
