"""The progress lines of a run on standard error, by optimiser step and by micro-batch."""

from __future__ import annotations

import sys
import time

ON_TERMINAL_S, ELSEWHERE_S = 1.0, 10.0
ERASE_REST = "\x1b[K"


class ProgressLine:
    """On a terminal one line, redrawn every second; elsewhere a line every ten seconds."""

    def __init__(self) -> None:
        self._printed = 0.0

    def wait(self) -> None:
        """Print nothing for a while from now."""
        self._printed = time.monotonic()

    @property
    def due(self) -> bool:
        every = ON_TERMINAL_S if sys.stderr.isatty() else ELSEWHERE_S
        return time.monotonic() - self._printed >= every

    def show(self, line: str, last: bool = False) -> None:
        self.wait()
        end = "\n" if last or not sys.stderr.isatty() else f"{ERASE_REST}\r"
        print(line, end=end, file=sys.stderr, flush=True)


def say(line: str) -> None:
    """A line of its own, in place of a progress line that may be there."""
    rest = ERASE_REST if sys.stderr.isatty() else ""
    print(f"{line}{rest}", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    hours, rest = divmod(max(int(seconds), 0), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
