"""Shards of a long job, done in this process or by Ray's workers on this machine or on a cluster.

    with open_workers(ray, ray_workers) as workers:
        for number, result in workers.map(open_work, tasks, progress): ...

A task is (number, payload). `open_work()` is called once in each process (it loads the model) and returns the function
that does one task: work(payload, note), where note(rows, tokens) reports what is done of it so far. What a task leaves
behind must be a whole file, or one that is continued: a worker that dies is started again, and its task with it. Each
worker holds one task at a time, and tasks are drawn only when one is free, so little is ever in flight.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from draftsmith.infer.files.ray_cluster import check_cluster, joined

Note = Callable[[int, int], None]
Work = Callable[[Any, Note], Any]
OpenWork = Callable[[], Work]
# (number, payload); None where the next task waits for a result.
Tasks = Iterable[tuple[int, Any] | None]
# (rows, tokens) over all workers, of this map.
Progress = Callable[[int, int], None]


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
        totals = WorkTotals(progress)
        for task in tasks:
            assert task is not None, "the next task waits for a result, and none is on its way"
            work = work or open_work()
            began = time.process_time()
            number = task[0]
            result = work(task[1], partial(totals.note, number))
            self.cpu_seconds += time.process_time() - began
            yield number, result


@dataclass(slots=True)
class WorkTotals:
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
    check_cluster(ray)


@contextmanager
def open_workers(ray: str | None = None, ray_workers: int | None = None, cuda: bool = False) -> Iterator[Workers]:
    """This process, or as many workers of Ray as asked for: by default one for each core or, for work on CUDA, each
    device. They end with the block, however it ends."""
    check_workers(ray, ray_workers)
    if ray is None:
        yield InProcess()
        return
    from draftsmith.infer.files.ray_workers import OnRay

    with joined(ray, ray_workers) as there:
        kind = "GPU" if cuda else "CPU"
        present = int(there.cluster_resources().get(kind, 0))
        if not present:
            raise ValueError(f"Ray finds no {kind} (--ray {ray}): give another --device, or a cluster that has one")
        with closing(OnRay(there, ray_workers or present, cuda)) as workers:
            workers.start()
            yield workers
