"""Tasks on Ray's workers (workers.py): each is a process that opens its work once, and is started again if it dies."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

from draftsmith.infer.files.workers import OpenWork, Progress, Tasks, Work, WorkTotals

PR_SET_PDEATHSIG = 1
# How often a task is begun again after its worker died.
RETRIES = 3
START_S = 120.0
# How often a worker is asked how far it is, which costs it and this process milliseconds.
ASK_S = 2.0


@dataclass(frozen=True, slots=True)
class _Setup:
    """What a worker needs before its first task. `seen`: a file that was made in the job's folder just now; `place`:
    the folder that relative paths start from."""

    key: int
    open_work: OpenWork
    seen: str
    place: str
    version: str


class _Worker:
    """Lives in a process of its own, which Ray starts again if it dies."""

    def __init__(self) -> None:
        if sys.platform == "linux":  # end with Ray, even in the middle of a task
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        self._key = -1
        self._work: Work | None = None
        self._noted = (0, 0)

    def ready(self, setup: _Setup) -> None:
        if self._key == setup.key:
            return
        host = socket.gethostname()
        if (own := metadata.version("draftsmith")) != setup.version:
            raise ValueError(f"the machine {host} has draftsmith {own}, not {setup.version}: install the same on all")
        if setup.seen and not os.path.exists(setup.seen):
            raise ValueError(
                f"the machine {host} does not see {os.path.dirname(setup.seen)}: put it on storage that all machines "
                "of the cluster share, under the same path"
            )
        if os.path.isdir(setup.place):
            os.chdir(setup.place)
        self._work, self._key = setup.open_work(), setup.key

    def run(self, setup: _Setup, payload: Any) -> tuple[Any, tuple[int, int], float]:
        """The result, what was noted last, and CPU seconds."""
        self._noted = (0, 0)
        self.ready(setup)
        assert self._work is not None
        began = time.process_time()
        result = self._work(payload, self._note)
        return result, self._noted, time.process_time() - began

    def _note(self, rows: int, tokens: int) -> None:
        self._noted = rows, tokens

    def noted(self) -> tuple[int, int]:
        return self._noted


class OnRay:
    """Tasks on Ray's workers; open_workers makes it."""

    def __init__(self, ray: Any, count: int, cuda: bool) -> None:
        self._ray = ray
        self.in_process = False
        self.count = count
        self.cpu_seconds = 0.0
        self._opened: OpenWork | None = None
        self._key = 0
        # Two calls at once: `noted` answers while `run` runs.
        options = {"num_cpus": 0 if cuda else 1, "num_gpus": int(cuda), "max_concurrency": 2}
        made = ray.remote(max_restarts=-1, max_task_retries=RETRIES, **options)(_Worker)
        self._actors = [made.remote() for _ in range(count)]

    def start(self) -> None:
        """Wait until the first worker has started."""
        calls = [actor.noted.remote() for actor in self._actors]
        if not self._ray.wait(calls, num_returns=1, timeout=START_S)[0]:
            raise ValueError(f"no worker of Ray has started within {START_S:.0f} s: all that the cluster has are taken")

    def close(self) -> None:
        for actor in self._actors:
            with suppress(Exception):
                self._ray.kill(actor)

    def map(
        self, open_work: OpenWork, tasks: Tasks, progress: Progress | None = None, shared: Path | None = None
    ) -> Iterator[tuple[int, Any]]:
        if open_work != self._opened:  # what workers have opened serves further maps
            self._opened, self._key = open_work, self._key + 1
        token = None if shared is None else shared.absolute() / f".seen-{uuid4().hex}"
        if token is not None:
            for left in token.parent.glob(".seen-*"):  # by a run that was killed
                left.unlink(missing_ok=True)
            token.touch()
        try:
            setup = _Setup(self._key, open_work, str(token or ""), os.getcwd(), metadata.version("draftsmith"))
            yield from _Map(
                self, self._ray, self._actors, self._ray.put(setup), iter(tasks), WorkTotals(progress)
            ).run()
        finally:
            if token is not None:
                token.unlink(missing_ok=True)


@dataclass(slots=True)
class _Map:
    """One map over the workers: which of them is at which task."""

    owner: OnRay
    ray: Any
    actors: Sequence[Any]
    setup: Any
    tasks: Iterator[tuple[int, Any] | None]
    totals: WorkTotals
    over: bool = False
    # Numbers of workers: those that have started and have no task, and the calls to the others.
    idle: list[int] = field(default_factory=list)
    starting: dict[Any, int] = field(default_factory=dict)
    # A call -> (its worker, its task's number).
    running: dict[Any, tuple[int, int]] = field(default_factory=dict)
    asked: dict[Any, tuple[int, int]] = field(default_factory=dict)

    def run(self) -> Iterator[tuple[int, Any]]:
        self.starting = {actor.ready.remote(self.setup): worker for worker, actor in enumerate(self.actors)}
        while True:
            self._hand_out()
            if self.over and not self.running:
                return
            assert self.running or self.starting, "the next task waits for a result, and none is on its way"
            done, _ = self.ray.wait([*self.running, *self.starting], timeout=ASK_S)
            for call in done:
                if call in self.starting:
                    self._get(call, "the start of a worker")
                    self.idle.append(self.starting.pop(call))
                    continue
                worker, number = self.running.pop(call)
                result, noted, seconds = self._get(call, f"task {number}")
                self.owner.cpu_seconds += seconds
                self.idle.append(worker)
                self._hand_out()  # before the caller works on the result
                self.totals.note(number, *noted)
                yield number, result
            self._ask_for_progress()

    def _hand_out(self) -> None:
        while self.idle and not self.over:
            try:
                task = next(self.tasks)
            except StopIteration:
                self.over = True
                return
            if task is None:
                return
            worker, (number, payload) = self.idle.pop(), task
            self.running[self.actors[worker].run.remote(self.setup, payload)] = worker, number

    def _get(self, call: Any, what: str) -> Any:
        """A call's result; a worker's ValueError is raised here."""
        from ray.exceptions import RayError, RayTaskError

        try:
            return self.ray.get(call)
        except RayTaskError as error:
            if isinstance(error.cause, ValueError):
                raise ValueError(str(error.cause)) from error
            raise
        except RayError as error:
            lines = str(error).strip().splitlines() or [""]
            if "creation task" in lines[0]:
                raise ValueError(f"a worker could not start: {lines[-1]}") from error
            raise ValueError(
                f"{what} was given up: its worker died {RETRIES + 1} times, often for want of memory ({lines[0]}); "
                "give fewer --ray_workers, and run the same command again to resume"
            ) from error

    def _ask_for_progress(self) -> None:
        """Note what the workers have done of their tasks; a question to one that has died has no answer."""
        from ray.exceptions import RayError

        calls = list(self.asked)
        for call in self.ray.wait(calls, num_returns=len(calls), timeout=0)[0] if calls else ():
            at = self.asked.pop(call)
            with suppress(RayError):
                rows_tokens = self.ray.get(call)
                if at in self.running.values():
                    self.totals.note(at[1], *rows_tokens)
        unanswered = {worker for worker, _ in self.asked.values()}
        for worker, number in self.running.values():
            if worker not in unanswered:
                self.asked[self.actors[worker].noted.remote()] = worker, number
