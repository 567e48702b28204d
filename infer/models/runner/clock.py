"""Seconds inside a model's passes, measured without waiting for them.

On a GPU a call only queues its work. Events mark where a pass begins and ends there; they are read when they have
passed, so a step that has downloaded its choices sees its passes in full, and nothing waits for the clock.
"""

from __future__ import annotations

import time
from typing import Any

import torch


class PassClock:
    """Of the passes on one device. `begin` and `end` enclose a pass."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._device = device
        self._seconds = 0.0
        self._unread: list[tuple[Any, Any]] = []

    def begin(self) -> Any:
        """A mark to be given to `end`."""
        return self._event() if self._on_gpu else time.perf_counter()

    def end(self, begun: Any) -> None:
        if self._on_gpu:
            self._unread.append((begun, self._event()))
        else:
            self._seconds += time.perf_counter() - begun

    @property
    def seconds(self) -> float:
        """Of all passes that have ended by now. One that is still running counts later."""
        while self._unread and self._unread[0][1].query():
            begun, ended = self._unread.pop(0)
            self._seconds += begun.elapsed_time(ended) / 1000
        return self._seconds

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
