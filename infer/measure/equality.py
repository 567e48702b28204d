"""Where two answers part: the first difference between token ids, or between texts.

What the answers are, and which of the two is the reference, is the caller's to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT = 24


def first_difference(one: Sequence[Any], other: Sequence[Any]) -> int | None:
    """The first index at which the two differ (one may have ended there), or None where they are equal."""
    if one == other:
        return None
    for index, (mine, theirs) in enumerate(zip(one, other)):
        if mine != theirs:
            return index
    return min(len(one), len(other))


def token_difference(base: Sequence[int], other: Sequence[int]) -> dict[str, Any] | None:
    """By token ids: index and the two tokens there; None stands for an answer that had already ended."""
    index = first_difference(list(base), list(other))
    if index is None:
        return None
    return {
        "by": "token_ids",
        "index": index,
        "base": base[index] if index < len(base) else None,
        "other": other[index] if index < len(other) else None,
    }


def text_difference(base: str, other: str) -> dict[str, Any] | None:
    """By characters: index and a little of both texts around it."""
    index = first_difference(base, other)
    if index is None:
        return None
    return {"by": "text", "index": index, "base": around(base, index), "other": around(other, index)}


def around(text: str, index: int) -> str:
    return text[max(0, index - CONTEXT) : index + CONTEXT]
