"""Python programs in processes of their own, forked from one that has imported the heavy packages already. Not tests:
what tests share.

A process that begins with `import torch, lightning` takes seconds before it comes to what a test is about. For a test
of importing, of memory, or of what Python reads at its start, start a Python of its own.
"""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path

# `python -m draftsmith.recipes WORDS`
COMMAND = "from draftsmith.recipes.cli.main import main\nmain()"
HEAVY = [
    "transformers.generation.utils", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama",
    "draftsmith.infer.models.load", "draftsmith.train.run.run", "draftsmith.infer.measure.bench",
]  # fmt: skip


@functools.cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    return context


def _begin(
    program: str, words: list[str], env: dict[str, str], streams: list[str], before: Callable[[], object]
) -> None:
    """Become the process of `python -c program words`."""
    with contextlib.suppress(PermissionError):  # the leader of a group already
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, path in enumerate(streams, start=1):
        opened = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOCTTY)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, "w", closefd=False), "utf-8", write_through=True) for number in (1, 2)
    )
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["-c", *words]
    before()
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})


def _nothing() -> None:
    pass


class Started:
    """A running program. What it writes goes to files, or to a terminal by its name. Like subprocess.Popen where the
    names are the same; a variable of `env` that is None is taken away."""

    def __init__(
        self, program: str, *words: object, env: Mapping[str, str | None] | None = None, terminal: str | None = None,
        before: Callable[[], object] = _nothing,
    ) -> None:  # fmt: skip
        folder = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._streams = [folder / "out", folder / "err"]
        for path in self._streams:
            path.touch()
        streams = [terminal] * 2 if terminal else [str(path) for path in self._streams]
        variables = {name: value for name, value in {**os.environ, **(env or {})}.items() if value is not None}
        given = (program, [*map(str, words)], variables, streams, before)
        self._process = _context().Process(target=_begin, args=given)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def stdout(self) -> str:
        return self._streams[0].read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return self._streams[1].read_text(encoding="utf-8")

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def wait(self, timeout: float = 300) -> int:
        """The exit code; after `timeout` the process is killed and this raises."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            self.kill()
            raise subprocess.TimeoutExpired("the program", timeout, self.stdout, self.stderr)
        return code


def run(
    program: str, *words: object, env: Mapping[str, str | None] | None = None, before: Callable[[], object] = _nothing
) -> subprocess.CompletedProcess[str]:
    """Run the program to its end."""
    started = Started(program, *words, env=env, before=before)
    code = started.wait()
    return subprocess.CompletedProcess([*map(str, words)], code, started.stdout, started.stderr)


def descendants(root: int) -> set[int]:
    """A process and all that were started by it, directly or not."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(text.rpartition(")")[2].split()[1])
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def listening(pid: int) -> dict[str, str]:
    """By socket, the local addresses on which a process listens, in the kernel's hexadecimal."""
    sockets = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            sockets.add(os.readlink(entry))
        except OSError:
            continue
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            socket = f"socket:[{fields[9]}]"
            if fields[3] == "0A" and socket in sockets:
                found[socket] = fields[1].split(":")[0]
    return found
