"""Starting the ranks of a target, and loading it with them.

Rank 0 is the process that asks for the target. It starts the others as Python processes of their own and watches them;
they watch it. Started by torchrun, every rank is there already, and torchrun watches them.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from draftsmith.infer.models.runner.masks import ChainPlan, MaskPlan
from draftsmith.infer.models.runner.model_runner import ModelRunner
from draftsmith.infer.models.tensor_parallel.heartbeat import LifeWatch
from draftsmith.infer.models.tensor_parallel.leading_runner import END, LeadingRunner
from draftsmith.infer.models.tensor_parallel.ranks import TIMEOUT, RankLost, Ranks

if TYPE_CHECKING:
    from draftsmith.infer.models.hf_target import HFTarget

# What ends the ranks that this process leads.
_ends: list[Callable[[], None]] = []
# Seconds that a rank gets to end by itself.
END_S = 5.0
LOOPBACK = "127.0.0.1"
MODULE = "draftsmith.infer.models.tensor_parallel"


@dataclass(frozen=True, slots=True)
class Shares:
    """What rank 0 knows of a target that is split: the ranks, how to end them, and of the whole model the number of
    parameters and the fingerprint."""

    ranks: Ranks
    end: Callable[[], None]
    parameters: int
    fingerprint: str
    # Of the models that the ranks hold: 0 is the target.
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def runner(self, model: Any, plan: MaskPlan | ChainPlan) -> LeadingRunner:
        return LeadingRunner(own_runner(model, plan), self.ranks, next(self.numbers))

    def draft_runner(self, name: str, dtype: str, exits: Sequence[int] = (), eager: bool = False) -> LeadingRunner:
        """The draft `name`, loaded over the same ranks. A fault in its files ends the target too, like any fault that
        ranks may find at different moments."""
        number = next(self.numbers)
        with _silent_stdout(), loading_together(self.ranks, self.end):
            self.ranks.send((number, [("load", (name, dtype, tuple(exits), eager))]))
            own = draft_share(name, dtype, exits, eager)
        return LeadingRunner(own, self.ranks, number)


def own_runner(model: Any, plan: MaskPlan | ChainPlan, exits: Sequence[int] = (), eager: bool = False) -> ModelRunner:
    """A rank's runner: all ranks pad passes alike, and none captures them, which nobody has tried over several."""
    if isinstance(plan, ChainPlan):
        raise ValueError(f"{model.config.model_type} verifies chains only, which is not made for several ranks: --tp 1")
    return ModelRunner(model, plan, exits=exits, eager=eager)


def draft_share(name: str, dtype: str, exits: Sequence[int], eager: bool) -> ModelRunner:
    """A rank's runner of its share of a draft; all ranks call it."""
    from draftsmith.infer.models.architectures import prepare
    from draftsmith.infer.models.tensor_parallel.sharding import load_shard

    model = load_shard(name, dtype).model
    return own_runner(model, prepare(model), exits, eager)


@contextlib.contextmanager
def loading_together(ranks: Ranks, end: Callable[[], None]) -> Iterator[None]:
    """What all ranks load. Unlike in a pass, an interrupt is heard at once: the others end with this process."""
    if ranks.failure:
        raise RankLost(ranks.failure)
    ranks.tokens, ranks.inside = 0, True
    try:
        yield
    except ValueError as problem:  # the model's fault, which all ranks find
        if isinstance(problem.__cause__, RuntimeError):  # a rank's
            ranks.fail(problem)
        end()
        raise
    except Exception as problem:
        ranks.fail(problem)
    ranks.inside = False


def load_leading(name: str, dtype: str, device: str, tp: int) -> HFTarget:
    """The target `name` split over `tp` ranks, of which this process becomes rank 0."""
    from draftsmith.infer.models.hf_target import HFTarget
    from draftsmith.infer.models.load import check_model
    from draftsmith.infer.models.tensor_parallel.sharding import load_shard
    from draftsmith.infer.text.tokenizer import load_tokenizer

    check_model(name, dtype, device, tp)
    if dist.is_initialized():
        raise ValueError("this process is a rank of something already, and can hold one target over ranks: close it")
    tokenizer = load_tokenizer(name)
    with _silent_stdout():
        ranks, end = _started(name, dtype, tp)
        with loading_together(ranks, end):
            shard = load_shard(name, dtype)
            target = HFTarget(shard.model, tokenizer, shares=Shares(ranks, end, shard.parameters, shard.fingerprint))
    return target


@contextlib.contextmanager
def _silent_stdout() -> Iterator[None]:
    """gloo writes a line to standard output for every group of ranks."""
    try:
        kept = os.dup(1)
    except OSError:  # closed by the caller
        yield
        return
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _started(name: str, dtype: str, tp: int) -> tuple[Ranks, Callable[[], None]]:
    """The ranks, met, and what ends them: at the end of this process, if not before."""
    _share_threads(tp)
    if "WORLD_SIZE" in os.environ:
        store, watch = join(tp, 0, None), None
    else:
        own = dist.TCPStore(LOOPBACK, 0, tp, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        watch = RankWatch([_start(name, dtype, tp, rank, own.port) for rank in range(1, tp)])
        _ends.append(watch.end)
        store = join(tp, 0, own)
    ranks = Ranks()
    alive = LifeWatch(store, ranks, functools.partial(ranks.lost, hangs=True))
    if watch is not None:
        watch.ranks, ranks.kill = ranks, watch.kill

    def end() -> None:
        alive.close()
        if watch is None:
            ranks.close(END)
        else:
            watch.end()

    _ends[:] = [end]
    alive.start()
    return ranks, end


@atexit.register
def end_all() -> None:
    """End the ranks that this process leads, if there are any."""
    while _ends:
        _ends.pop()()


def _share_threads(tp: int) -> None:
    """On a CPU all ranks of this machine share its cores."""
    if not torch.cuda.is_available():
        torch.set_num_threads(max(torch.get_num_threads() // int(os.environ.get("LOCAL_WORLD_SIZE", tp)), 1))


def join(tp: int, rank: int, store: dist.Store | None) -> dist.Store:
    """Become one of the ranks, which meet in `store`, or in the one that torchrun has set up."""
    if not torch.cuda.is_available() and sys.platform == "linux" and store is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name may resolve to no address of this machine
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if store is None:
        store, _, _ = next(rendezvous("env://", rank, tp, timeout=TIMEOUT))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=tp)
    return store


def _start(name: str, dtype: str, tp: int, rank: int, port: int) -> subprocess.Popen[bytes]:
    words: dict[str, Any] = {"name": name, "dtype": dtype, "tp": tp, "rank": rank, "port": port, "parent": os.getpid()}
    words["threads"] = torch.get_num_threads()
    try:
        words["stderr"] = os.dup(2)
    except OSError:  # closed by the caller
        words["stderr"] = os.open(os.devnull, os.O_WRONLY)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", MODULE, json.dumps(words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[words["stderr"]],
            start_new_session=True,  # a terminal's Ctrl-C is for rank 0
            env={**os.environ, "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
    finally:
        os.close(words["stderr"])


class RankWatch:
    """Watches the processes of the other ranks, a thread for each."""

    def __init__(self, children: Sequence[subprocess.Popen[bytes]]) -> None:
        self.children = children
        self.ranks: Ranks | None = None
        self._ending = self._killed = False
        self._threads = [
            threading.Thread(target=self._wait, args=(rank, child), daemon=True)
            for rank, child in enumerate(children, start=1)
        ]
        for thread in self._threads:
            thread.start()

    def _wait(self, rank: int, child: subprocess.Popen[bytes]) -> None:
        assert child.stderr is not None
        with child.stderr:
            said = deque(child.stderr, maxlen=1)
        code = child.wait()
        if self._ending or self._killed:
            return
        if code < 0:
            reason = f"rank {rank} was ended by signal {-code} ({signal.Signals(-code).name})"
        else:
            last = said[-1].decode(errors="replace").strip() if said else ""
            reason = f"rank {rank} ended with exit code {code}" + (f": {last}" if last else "")
        if self.ranks is None:  # the ranks have not met yet, and never will
            with contextlib.suppress(OSError):
                os.write(2, f"draftsmith: the target is gone: {reason}\n".encode())
            os._exit(1)
        self.ranks.lost(reason)

    def kill(self) -> None:
        """End ranks that may hang: nobody is to report that they ended."""
        self._killed = True
        for child in self.children:
            child.kill()

    def end(self) -> None:
        """Let the ranks end, or end them."""
        if self._ending:
            return
        self._ending = True
        if self.ranks is not None:
            self.ranks.close(END)
        for child in self.children:
            if self.ranks is None or self.ranks.broken:
                child.kill()
            try:
                child.wait(END_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        for thread in self._threads:
            thread.join(END_S)
