"""The processes of a run on several devices: what must hold before they start, and what ends all when one has died.

Lightning's own watch kills the first rank without a word, seconds later, and none of the others' where that one died.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from draftsmith.train.data.batches import rank

# A rank's children know by it whose they are.
LAUNCHER = "DRAFTSMITH_LAUNCHER"
EVERY = 0.2
# What a rank has to report an error of its own, when another has ended.
GRACE = 2.0


def check_launch(devices: int, num_nodes: int) -> None:
    """ValueError where the environment does not fit the numbers, or the ranks could not meet."""
    given = os.environ
    world = devices * num_nodes
    started = int(given.get("WORLD_SIZE", world)) if "LOCAL_RANK" in given else world
    if started != world:
        raise ValueError(
            f"the launcher started {started} ranks, and --devices {devices} --num_nodes {num_nodes} make {world}: give "
            "the numbers that it was started with"
        )
    if world == 1 or "SLURM_PROCID" in given:
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in given]
    if not {"NODE_RANK", "GROUP_RANK", "RANK"} & given.keys():
        missing.append("NODE_RANK")
    if num_nodes > 1 and missing:
        raise ValueError(
            f"--num_nodes {num_nodes}: {', '.join(missing)} not set; start the command once on each machine by "
            "torchrun or srun, or with MASTER_ADDR, MASTER_PORT and NODE_RANK (0 on the first) in the environment"
        )
    port = given.get("MASTER_PORT")
    if port is None or rank() or "LOCAL_RANK" in given:
        return
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"MASTER_PORT={port}: give the number of a free port")
    try:
        with socket.create_server(("", int(port))):
            pass
    except OSError as error:
        mend = "another to all machines" if num_nodes > 1 else "another, or unset it"
        raise ValueError(f"MASTER_PORT={port} cannot be used ({os.strerror(error.errno or 0)}): give {mend}") from error


class DeadRankWatch:
    """Ends this process with one line when a rank on this machine has died. `explain`: what to do then."""

    def __init__(self, explain: Callable[[], str]) -> None:
        self._explain = explain
        self._children: Sequence[subprocess.Popen[bytes]] = ()
        self._launcher = int(os.environ.get(LAUNCHER, 0))
        self._over = threading.Event()
        self._ending = threading.Lock()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch, in place of Lightning's observer of the processes that it starts."""
        from lightning.pytorch.strategies.launchers import subprocess_script

        name, before = "_launch_process_observer", subprocess_script._launch_process_observer
        setattr(subprocess_script, name, self._watch_children)
        if self._launcher:
            self._start()
        else:
            os.environ[LAUNCHER] = str(os.getpid())
        try:
            yield
        finally:
            self._over.set()
            setattr(subprocess_script, name, before)
            if not self._launcher:
                os.environ.pop(LAUNCHER, None)

    def _watch_children(self, children: Sequence[subprocess.Popen[bytes]]) -> None:
        self._children = children
        self._start()

    def _start(self) -> None:
        threading.Thread(target=self._watch, daemon=True, name="rank-watch").start()

    def _watch(self) -> None:
        while self._dead() is None:
            if self._over.wait(EVERY):
                return
        if not self._over.wait(GRACE):
            self.end()

    def _dead(self) -> str | None:
        """Which rank on this machine has died, and how."""
        if self._launcher and os.getppid() != self._launcher:
            return "rank 0 has died"
        for number, child in enumerate(self._children, start=1):
            if code := child.poll():
                how = (
                    f"was killed by signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                )
                return f"rank {number} {how}"
        return None

    def end(self) -> None:
        """End this process and its children; the first that is left on each machine says why."""
        with self._ending:
            until = time.monotonic() + GRACE
            while (dead := self._dead()) is None and time.monotonic() < until:
                time.sleep(EVERY / 4)
            local = int(os.environ.get("LOCAL_RANK", 0))
            if local == 0 or (local == 1 and dead):
                print(f"draftsmith train: {dead or 'a rank has died'}{self._explain()}", file=sys.stderr, flush=True)
            for child in self._children:
                child.kill()
            os._exit(1)


def lost_a_rank(error: BaseException) -> bool:
    """Whether `error` is that of a collective whose other end is gone."""
    if not torch.distributed.is_available():
        return False
    if isinstance(error, torch.distributed.DistError):
        return True
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
