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


def check_writable(path: str | Path, folder: bool = False) -> None:
    """Refuse an output path that cannot be written: a file, or a `folder`. Creates nothing."""
    if not str(path) or "\0" in str(path):
        raise ValueError(f"{str(path)!r} is not a path: name a {'folder' if folder else 'file'} to write to")
    path = Path(path).expanduser()
    if path.is_dir() != folder and os.path.lexists(path):
        what = "a file: name a folder" if folder else "a folder: name a file"
        raise ValueError(f"{path} cannot be written: it is {what}")
    place = path
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if place != path and not place.is_dir():
        raise ValueError(f"{path} cannot be written: {place} is not a folder")
    # A file is replaced by renaming another to it, which needs its folder.
    place = place if folder or place.is_dir() else place.parent
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: no permission to write in {place}")


def is_hub_name(name: str) -> bool:
    """Whether `name` has the form owner/name."""
    return _HUB_NAME.fullmatch(name) is not None


def may_be_on_hub(name: str) -> bool:
    """Whether a `name` that does not exist here may be looked up on the Hub: a path into a local folder may not."""
    return is_hub_name(name) and not Path(name.split("/")[0]).is_dir()
