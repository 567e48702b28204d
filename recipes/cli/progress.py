"""Progress of long work on standard error: on a terminal one line, redrawn; elsewhere a line every ten seconds."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

ERASE_REST = "\x1b[K"
EVERY_S = 10.0


@dataclass(slots=True)
class Progress:
    """`open`: the cursor is at the end of a progress line; call `end` before printing anything else."""

    open: bool = False
    _printed: float = field(default_factory=time.monotonic)

    def __call__(self, line: str, last: bool = False) -> None:
        if sys.stderr.isatty():
            print(f"\r{line}{ERASE_REST}", end="\n" if last else "", file=sys.stderr, flush=True)
            self.open = not last
            return
        now = time.monotonic()
        if last or now - self._printed >= EVERY_S:
            self._printed = now
            print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        """End the current line, so that other output starts on a new one."""
        if self.open:
            print(file=sys.stderr, flush=True)
            self.open = False


# One for the process: there is one standard error.
progress = Progress()
