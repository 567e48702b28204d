"""The processes that hold one target together: how rank 0 reaches the others, and what happens when one is lost.

Rank 0 sends what the others are to do over a group of its own, which waits for as long as nobody asks for anything.
Where a rank is lost, what runs on rank 0 raises RankLost; a thread that nobody waits for ends the process itself.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from draftsmith.infer.models.tensor_parallel.heartbeat import PassTimes

# A pass, or a load, in which one rank waits longer than this for another has failed.
TIMEOUT = timedelta(minutes=30)
FOREVER = timedelta(days=365)
# Bytes of a message that travel with its length; of a longer one the rest follows.
FIRST = 4096
LENGTH = 8
# Seconds: for the reason of a failure to come in, and for a process that was reached by it to end by itself.
REASON_S, ALL_REASONS_S, GRACE_S = 2.0, 0.2, 4.0


class RankLost(SystemExit):
    """A rank has ended or failed: what the ranks hold together is lost, and so is what this process was doing. Like an
    interrupt, it is no error of a row's or a question's."""


class Ranks:
    """The ranks of one target; one such group per process at a time. Made by all ranks, after
    torch.distributed.init_process_group."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._messages = dist.new_group(backend="gloo", timeout=FOREVER)
        self.failure = ""
        self.ended = False
        # Whether all ranks are running something together now, or were when it broke off.
        self.inside = False
        # Of the pass that they are running: its number, and over how many tokens it goes; 0 if that is not known.
        self.passes, self.tokens = 0, 0
        self.times = PassTimes()
        # Ends the processes of the other ranks that this one has started, if any.
        self.kill: Callable[[], None] = lambda: None
        self._reasons: list[str] = []
        self._reason_came = threading.Event()

    # messages

    def send(self, message: Any) -> None:
        """From rank 0 to all others, each of which must `receive`."""
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        whole = len(data).to_bytes(LENGTH, "little") + data
        self._broadcast(bytearray(whole[:FIRST].ljust(FIRST, b"\0")))
        if len(whole) > FIRST:
            self._broadcast(bytearray(whole[FIRST:]))

    def receive(self) -> Any:
        first = bytearray(FIRST)
        self._broadcast(first)
        length = int.from_bytes(first[:LENGTH], "little")
        rest = bytearray(max(LENGTH + length - FIRST, 0))
        if rest:
            self._broadcast(rest)
        return pickle.loads(bytes(first[LENGTH : LENGTH + length] + rest))

    def _broadcast(self, data: bytearray) -> None:
        dist.broadcast(torch.frombuffer(data, dtype=torch.uint8), 0, group=self._messages)

    # failures

    @contextlib.contextmanager
    def together(self, tokens: int = 0) -> Iterator[None]:
        """What runs inside needs all ranks: an interrupt waits for its end, and an error of any kind loses the ranks,
        for the others may be anywhere. `tokens`: of the pass, if it may be timed."""
        if self.failure:
            raise RankLost(self.failure)
        with interrupts_wait():
            self.passes, self.tokens = self.passes + 1, tokens
            self.inside = True
            began = time.perf_counter()
            try:
                yield
            except Exception as problem:
                self.fail(problem)
            self.inside = False
            if tokens:
                self.times.note(tokens, time.perf_counter() - began)

    @property
    def broken(self) -> bool:
        """Whether the ranks can do nothing together any more."""
        return self.inside or bool(self.failure)

    def fail(self, problem: Exception) -> NoReturn:
        """Raise RankLost for what went wrong while all ranks were running something, naming the rank to blame."""
        self._reason_came.wait(REASON_S)
        time.sleep(ALL_REASONS_S)  # the rank that was killed, and not one that noticed
        first = (str(problem).splitlines() or [""])[0]
        found = sorted(self._reasons, key=lambda reason: "signal" not in reason)
        line = found[0] if found else f"a rank was lost, or failed: {type(problem).__name__}: {first}"
        self.failure = f"draftsmith: the target is gone: {line}"
        if threading.current_thread() is not threading.main_thread():
            self.end_here()  # nobody would hear of an exception in another thread
        raise RankLost(self.failure) from problem

    def lost(self, reason: str, hangs: bool = False) -> None:
        """A watching thread has found that a rank ended, or `hangs` and is to be ended. Where this process does not
        notice, it ends here."""
        if self.ended:
            return
        self._reasons.append(reason)
        self._reason_came.set()
        if hangs:
            self.kill()
        time.sleep(GRACE_S)
        if not self.ended:
            self.failure = self.failure or f"draftsmith: the target is gone: {reason}"
            self.end_here()

    def end_here(self) -> None:
        """End this process without waiting for anything."""
        self.kill()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        with contextlib.suppress(OSError):
            os.write(2, f"{self.failure}\n".encode())
        os._exit(1)

    def close(self, last_message: Any) -> None:
        """On rank 0, at the end: let the others end."""
        if self.ended:
            return
        self.ended = True
        with contextlib.suppress(Exception):
            if not self.broken:
                self.send(last_message)
            if not self.broken or not torch.cuda.is_available():  # NCCL would wait for a rank that is lost
                dist.destroy_process_group()


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Ctrl-C is heard after the end; a second one at once."""
    if threading.current_thread() is not threading.main_thread() or (before := signal.getsignal(signal.SIGINT)) is None:
        yield
        return
    seen: list[tuple[Any, ...]] = []

    def note(*given: Any) -> None:
        seen.append(given)
        if len(seen) > 1:
            _hear(before, seen[-1])

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if seen:
        _hear(before, seen[0])


def _hear(handler: Callable[..., Any] | int | signal.Handlers, given: tuple[Any, ...]) -> None:
    if callable(handler):
        handler(*given)
    elif handler == signal.SIG_DFL:
        raise KeyboardInterrupt
