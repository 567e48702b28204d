"""Shards of a long job, done in this process or by Ray's workers on this machine or on a cluster.

    with open_workers(ray, ray_workers) as workers:
        for number, result in workers.map(open_work, tasks, progress): ...

A task is (number, payload). `open_work()` is called once in each process (it loads the model) and returns the function
that does one task: work(payload, note), where note(rows, tokens) reports what is done of it so far. What a task leaves
behind must be a whole file, or one that is continued: a worker that dies is started again, and its task with it. Each
worker holds one task at a time, and tasks are drawn only when one is free, so little is ever in flight.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

Note = Callable[[int, int], None]
Work = Callable[[Any, Note], Any]
OpenWork = Callable[[], Work]
# (number, payload); None where the next task waits for a result.
Tasks = Iterable[tuple[int, Any] | None]
# (rows, tokens) over all workers, of this map.
Progress = Callable[[int, int], None]

LOCAL = "local"
PR_SET_PDEATHSIG = 1
# How often a task is begun again after its worker died.
RETRIES = 3
CONNECT_S = 3.0
START_S = 120.0
POLL_S = 0.5
# A Unix socket's path has at most 107 bytes, and Ray's add about 60 to its folder.
LONGEST_FOLDER = 40


class Workers(Protocol):
    """`count`: how many tasks run at once. `cpu_seconds`: what the tasks took, over all workers."""

    in_process: bool
    count: int
    cpu_seconds: float

    def map(
        self, open_work: OpenWork, tasks: Tasks, progress: Progress | None = None, shared: Path | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Each task's number and result, in the order in which they end. `shared`: a folder that tasks write to."""
        ...


@dataclass(slots=True)
class InProcess:
    """One task after the other, in this process."""

    in_process: bool = True
    count: int = 1
    cpu_seconds: float = 0.0

    def map(
        self, open_work: OpenWork, tasks: Tasks, progress: Progress | None = None, shared: Path | None = None
    ) -> Iterator[tuple[int, Any]]:
        work: Work | None = None
        totals = _Totals(progress)
        for task in tasks:
            assert task is not None, "the next task waits for a result, and none is on its way"
            work = work or open_work()
            began = time.process_time()
            number = task[0]
            result = work(task[1], partial(totals.note, number))
            self.cpu_seconds += time.process_time() - began
            yield number, result


@dataclass(slots=True)
class _Totals:
    """Rows and tokens over all tasks; a task that is begun again counts from its start."""

    progress: Progress | None
    by_task: dict[int, tuple[int, int]] = field(default_factory=dict)

    def note(self, number: int, rows: int, tokens: int) -> None:
        if self.by_task.get(number) != (rows, tokens):
            self.by_task[number] = rows, tokens
            if self.progress is not None:
                self.progress(*map(sum, zip(*self.by_task.values())))


def check_workers(ray: str | None, ray_workers: int | None) -> None:
    """ValueError, within seconds, for options with which no worker could start."""
    if ray is None:
        if ray_workers is not None:
            raise ValueError("--ray_workers counts the workers of --ray: add --ray local, or --ray HOST:PORT")
        return
    host, port = _address(ray)
    _import_ray(ray)
    if ray == LOCAL:
        return
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except OSError as problem:
        raise ValueError(f"no Ray cluster answers at {ray} ({problem}): start one with `ray start`") from problem


def _address(ray: str) -> tuple[str, int]:
    host, colon, port = ("127.0.0.1", ":", "1") if ray == LOCAL else ray.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 1 << 16) or "/" in host:
        raise ValueError(f"--ray {ray!r}: give `local`, or the HOST:PORT of a running cluster such as 10.0.0.1:6379")
    return host.strip("[]"), int(port)


@contextmanager
def open_workers(ray: str | None = None, ray_workers: int | None = None, cuda: bool = False) -> Iterator[Workers]:
    """This process, or as many workers of Ray as asked for: by default one for each core or, for work on CUDA, each
    device. They end with the block, however it ends."""
    check_workers(ray, ray_workers)
    if ray is None:
        yield InProcess()
        return
    with _connected(ray, ray_workers) as there:
        kind = "GPU" if cuda else "CPU"
        present = int(there.cluster_resources().get(kind, 0))
        if not present:
            raise ValueError(f"Ray finds no {kind} (--ray {ray}): give another --device, or a cluster that has one")
        with closing(OnRay(there, ray_workers or present, cuda)) as workers:
            workers.start()
            yield workers


def _import_ray(address: str) -> Any:
    # Before the import, which reads them. Nothing is reported to Ray's makers, nor printed where results are.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] = "."
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "3")  # to join what is no Ray: a second each
    if address == LOCAL:
        # Without a cluster Ray listens on loopback only; the token keeps out the other users of this machine.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ValueError("ray is not installed: pip install 'draftsmith[ray]'") from error
    return ray


@contextmanager
def _connected(address: str, ray_workers: int | None) -> Iterator[Any]:
    """The module ray, connected; a local Ray listens on loopback only and leaves no folder behind."""
    ray = _import_ray(address)
    if ray.is_initialized():
        raise ValueError("this process is connected to Ray already")
    quiet: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    if address != LOCAL:
        try:
            with _without_stderr():
                ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError, AssertionError) as problem:
            line = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
            raise ValueError(
                f"cannot join the Ray cluster at {address} ({line}): run this on one of its machines, with its version "
                "of Ray and, if it asks for one, its RAY_AUTH_TOKEN"
            ) from problem
        try:
            yield ray
        finally:
            ray.shutdown()
        return
    folder = tempfile.mkdtemp(
        prefix="draftsmith-", dir=None if len(tempfile.gettempdir()) <= LONGEST_FOLDER else "/tmp"
    )
    cores = ray_workers or len(os.sched_getaffinity(0))
    try:
        ray.init(
            address="local",
            num_cpus=cores,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
            **quiet,
        )
        yield ray
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Ray's own code prints a warning for each attempt to connect."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


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
            yield from _Map(self, self._ray, self._actors, self._ray.put(setup), iter(tasks), _Totals(progress)).run()
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
    totals: _Totals
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
            done, _ = self.ray.wait([*self.running, *self.starting], timeout=POLL_S)
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
