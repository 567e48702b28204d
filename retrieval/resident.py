"""How much of a store's mapped files this process holds in memory, and a bound on it.

Pages that are read count as the process's own until the system takes them back, which it does at need. A bound gives
them back before: they stay in the system's cache, and come back when they are read again. Linux alone tells what is
resident; elsewhere there is no bound.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Protocol

STATM = Path("/proc/self/statm")


class Mapped(Protocol):
    def keep_small(self) -> None: ...

    def release(self) -> None: ...


def resident_mb() -> float:
    """MB of mapped files that are in this process's memory now."""
    file = os.open(STATM, os.O_RDONLY)
    try:
        return int(os.read(file, 128).split()[2]) * mmap.PAGESIZE / 2**20
    finally:
        os.close(file)


class Residency:
    """Keeps what a store adds to the process's memory near `limit_mb`; `check` after every use of it.

    What else the process maps meanwhile (a model's weights, say) is seen as well, once: the count begins anew at every
    release.
    """

    def __init__(self, store: Mapped, limit_mb: float) -> None:
        self._store = store
        self._limit_mb = limit_mb
        store.keep_small()
        self._release()

    def check(self) -> None:
        if resident_mb() > self._most:
            self._release()

    def _release(self) -> None:
        self._store.release()
        self._most = resident_mb() + self._limit_mb
