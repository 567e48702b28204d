"""Ranks that stop or hang end the others within seconds, with one line; ranks that are busy, or that continue after a
pause of rank 0, are left alone."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path

import processes
import pytest
import torch
from over_ranks import IN_PREFILL, IN_STEPS, LOAD, alive, children, saved, until
from tiny_models import tiny_model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="two ranks on the CPU: hide the CUDA devices")
IDLE = "print('again' * 9, flush=True)\nimport time\ntime.sleep(300)"
PATIENCE = """
from draftsmith.infer.models.tensor_parallel import heartbeat
heartbeat.SILENT_S, heartbeat.SLACK_S = {silent}, {slack}
"""
# Each longer than the last, up to one that takes twice as long as a rank may be silent.
LONG_PASSES = """
import time
from draftsmith.infer.models.runner.entries import Entries
taken, count = 0.0, 8
while taken < 2 * heartbeat.SILENT_S:
    rows = [object() for _ in range(count)]
    for row in rows:
        target.lm.open(row, 500)
    began = time.perf_counter()
    target.lm.forward(rows, [Entries.chain([7] * 500) for _ in rows], (), [1] * count)
    taken, count = time.perf_counter() - began, count * 4
    for row in rows:
        target.lm.close(row)
"""
# Found by rank 1 alone: rank 0's process is forked from one that has read its modules long before.
HANGING = """
import sys, time
if "draftsmith.infer.models.tensor_parallel" in sys.orig_argv:
    from draftsmith.infer.models.tensor_parallel import follower
    carried = []
    carry_out = follower.carry_out
    def hang(*given):
        carried.append(1)
        time.sleep(300 if len(carried) > 40 else 0)
        carry_out(*given)
    follower.carry_out = hang
"""


@pytest.fixture
def start(tmp_path: Path):
    """Starts two ranks; the rank 0 that was started, and the process of rank 1. Both are ended afterwards."""
    pids: list[int] = []
    leaders: list[processes.Started] = []

    def begin(work: str, silent: float = 10, slack: float = 60, **env: str) -> tuple[processes.Started, int]:
        folder = saved(tmp_path / "target", tiny_model("llama"), torch.float32)
        leader = processes.Started(PATIENCE.format(silent=silent, slack=slack) + LOAD + work, folder, env=env)
        leaders.append(leader)
        assert until(lambda: leader.stdout.count("again") > 5 or leader.poll() is not None, 120), leader.stderr
        assert leader.poll() is None, leader.stderr
        pids.extend(children(leader.pid))
        return leader, pids[-1]

    yield begin
    for leader in leaders:
        leader.kill()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def stop(leader: processes.Started, follower: int, silent: int) -> None:
    os.kill(follower, signal.SIGSTOP)
    began = time.monotonic()
    assert leader.wait(15) == 1
    assert time.monotonic() - began > silent / 2
    assert leader.stderr == f"draftsmith: the target is gone: rank 1 has stopped: no sign of life for {silent} s\n"
    assert until(lambda: not alive(follower), 1)


def test_a_rank_that_is_stopped_ends_all_and_busy_or_paused_ones_do_not(start):
    leader, follower = start(LONG_PASSES + IN_STEPS, silent=2)
    leader.send_signal(signal.SIGSTOP)  # Ctrl-Z
    time.sleep(4)
    seen = leader.stdout.count("again")
    leader.send_signal(signal.SIGCONT)
    assert until(lambda: leader.stdout.count("again") > seen + 20 or leader.poll() is not None, 20)
    assert (leader.poll(), leader.stderr) == (None, "")
    stop(leader, follower, 2)


@pytest.mark.slow
@pytest.mark.parametrize("work", [IN_STEPS, IN_PREFILL, IDLE], ids=["in a step", "in prefill", "idle"])
def test_a_rank_that_is_stopped_ends_all_within_15_s(start, work):
    stop(*start(work), 10)


def test_a_rank_that_hangs_in_a_pass_ends_all(start, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HANGING)
    leader, follower = start(IN_STEPS, slack=2, PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert leader.wait(60) == 1
    line = r"draftsmith: the target is gone: a pass has not ended within (\d+) s: a rank hangs in it\n"
    found = re.fullmatch(line, leader.stderr)
    assert found, leader.stderr
    assert 2 <= int(found[1]) < 60  # more than 2 on a busy machine, whose passes took long before
    assert until(lambda: not alive(follower), 1)
