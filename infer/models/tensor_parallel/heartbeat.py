"""Signs of life of the ranks, and how long a pass may take.

Every rank but 0 counts up a number in the ranks' store, from a thread of its own: a rank that is busy goes on counting,
however long its pass or its load takes, and a process that is stopped does not. A rank that counts but hangs in a pass
is noticed by the time that the pass takes, against that of the passes before.

Time is counted in looks of rank 0, not by a clock: while rank 0 itself is stopped (Ctrl-Z) nobody is missed.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from draftsmith.infer.models.tensor_parallel.ranks import Ranks

# Seconds between two signs of life, and between two looks; without a new sign for SILENT_S a rank is lost, and for
# LOADING_S while models are loaded: reading a large library from a slow disk stops all threads of a process.
BEAT_S, SILENT_S, LOADING_S = 0.5, 10.0, 60.0
# A pass may take this many times what its tokens took at the slowest before, and SLACK_S at least: longer contexts,
# other load on the machine. The first pass may take any time.
PATIENCE, SLACK_S = 30.0, 60.0
KEY = "draftsmith/alive/{}"


def beat(store: dist.Store, rank: int) -> None:
    """Give signs of life from now to the end of this process."""
    own: dist.Store = store.clone()  # type: ignore[attr-defined]

    def run() -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone, with rank 0 or its launcher: they are watched
            for count in itertools.count(1):
                own.set(KEY.format(rank), str(count))
                pause.wait(BEAT_S)

    pause = threading.Event()
    threading.Thread(target=run, daemon=True).start()


class PassTimes:
    """What passes took so far. `slowest`: in seconds per token; 0 before the first has ended."""

    def __init__(self) -> None:
        self.slowest = 0.0

    def note(self, tokens: int, seconds: float) -> None:
        self.slowest = max(self.slowest, seconds / tokens)

    def most(self, tokens: int) -> float:
        """Seconds within which a pass over this many tokens should have ended."""
        return max(SLACK_S, PATIENCE * self.slowest * tokens) if self.slowest and tokens else math.inf


class LifeWatch:
    """Rank 0's look at the other ranks. `on_loss` gets the reason, once, in the watch's own thread."""

    def __init__(self, store: dist.Store, ranks: Ranks, on_loss: Callable[[str], None]) -> None:
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]
        self._ranks = ranks
        self._on_loss = on_loss
        self._seen: dict[int, bytes] = {}
        self._silent = dict.fromkeys(range(1, ranks.size), 0)
        self._pass, self._in_pass = -1, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="ranks")

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(BEAT_S):
            try:
                reason = self.look()
            except RuntimeError:  # the store has ended with the launcher that held it, which ends the ranks too
                return
            if reason and not self._over.is_set():
                self._over.set()
                self._on_loss(reason)

    def look(self) -> str:
        """Why a rank is lost; empty if none is."""
        ranks = self._ranks
        silent = LOADING_S if ranks.inside and not ranks.tokens else SILENT_S
        for rank in self._silent:
            key = KEY.format(rank)
            now = self._store.get(key) if self._store.check([key]) else b""
            self._silent[rank] = self._silent[rank] + 1 if self._seen.get(rank, b"") == now else 0
            self._seen[rank] = now
            if self._silent[rank] * BEAT_S >= silent:
                return f"rank {rank} has stopped: no sign of life for {silent:g} s"
        same = ranks.inside and not ranks.failure and ranks.passes == self._pass
        self._pass, self._in_pass = ranks.passes, self._in_pass + 1 if same else 0
        most = ranks.times.most(ranks.tokens)
        if self._in_pass * BEAT_S > most:
            return f"a pass has not ended within {most:.0f} s: a rank hangs in it"
        return ""

    def close(self) -> None:
        """End the thread, unless it has found a rank lost."""
        if not self._over.is_set():
            self._over.set()
            self._thread.join()
