"""What an error says, for messages of one line."""

from __future__ import annotations


def first_line(problem: BaseException) -> str:
    """The first line of what it says, or its type if it says nothing."""
    return next(iter(str(problem).strip().splitlines()), type(problem).__name__)
