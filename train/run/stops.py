"""What ends a run before its last step: SIGTERM, a loss that is no longer finite.

Both end between micro-batches, as `Stopped`, with the weights of the last finished step in memory.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable
from typing import Any

import torch

from draftsmith.train.run.sharding import own_part

DIVERGED, TERMINATED = 1, 128 + signal.SIGTERM
MEND = "lower --optim.lr or raise --optim.warmup, and give a new --out"


class Stopped(Exception):
    """The run has stopped early; the message is one line for the user, `exit_code` the command's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Sigterm:
    """Notes the signal instead of ending the process; replaces Lightning's handler until Lightning's teardown."""

    def __init__(self) -> None:
        self.received = False

    def install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self)

    def __call__(self, number: int, frame: Any) -> None:
        self.received = True


def diverged(step: int, what: str) -> Stopped:
    return Stopped(f"step {step}: {what}; {MEND}", DIVERGED)


def all_finite(weights: Iterable[torch.Tensor]) -> bool:
    return all(bool(own_part(weight).isfinite().all()) for weight in weights)
