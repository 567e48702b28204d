"""Scripts that check the project's own claims. They are not installed with the package."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any


def run_study(study: Callable[..., Any], words: Sequence[str] | None = None) -> Any:
    """Call `study` with the command line's options, written as for `draftsmith` commands; returns its result."""
    from jsonargparse import auto_cli

    from draftsmith.recipes.cli.argv import normalise, options

    return auto_cli(study, args=normalise(sys.argv[1:] if words is None else words, options(study)))
