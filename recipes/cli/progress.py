"""Progress of long work on standard error: one line drawn over itself on a terminal, plain lines elsewhere.

In a file, or through a pipe, a line comes every ten seconds and at the end, without control characters. What is worked
on is not known here.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

ERASE_REST = "\x1b[K"
EVERY_S = 10.0


@dataclass(slots=True)
class Progress:
    """`open`: a line is being drawn over, and whoever prints next has to end it."""

    open: bool = False
    _told: float = field(default_factory=time.monotonic)

    def __call__(self, line: str, last: bool = False) -> None:
        if sys.stderr.isatty():
            print(f"\r{line}{ERASE_REST}", end="\n" if last else "", file=sys.stderr, flush=True)
            self.open = not last
            return
        now = time.monotonic()
        if last or now - self._told >= EVERY_S:
            self._told = now
            print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the line that is being drawn over as it stands."""
        if self.open:
            print(file=sys.stderr, flush=True)
            self.open = False


# There is one standard error, so one line on it.
progress = Progress()
