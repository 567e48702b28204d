"""Where this machine keeps what can be made again: tokenised text, measured costs, calibrations of drafts on the Hub.

What is kept there is not known here.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$DRAFTSMITH_CACHE, else `draftsmith` in the user's cache folder. Looked up when asked, never on import."""
    own = os.environ.get("DRAFTSMITH_CACHE")
    return Path(own or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "draftsmith").expanduser()
