"""Where things are: the cache folder of this machine, and names on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def cache_folder() -> Path:
    """$DRAFTSMITH_CACHE, else `draftsmith` in the user's cache folder: tokenised text, costs, calibrations.

    Read on each call, never on import.
    """
    own = os.environ.get("DRAFTSMITH_CACHE")
    return Path(own or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "draftsmith").expanduser()


def is_hub_name(name: str) -> bool:
    """Whether `name` has the form owner/name."""
    return _HUB_NAME.fullmatch(name) is not None


def may_be_on_hub(name: str) -> bool:
    """Whether a `name` that does not exist here may be looked up on the Hub: a path into a local folder may not."""
    return is_hub_name(name) and not Path(name.split("/")[0]).is_dir()
