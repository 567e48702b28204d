"""Leakage: which replayed answers stand word for word in what a drafter drafts from, so that it need only repeat them.

An answer stands there if all its token ids, less the special tokens that end it, follow one another within one document
of the drafter's store, at the moment when its replay begins. Short answers stand in many a store and are no sign of a
mistake; so the share is told by answers and by tokens, and every figure is told without them as well.

Which drafters have stores is not known here: those that have a method `holds`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Holder(Protocol):
    """A drafter that can tell what it drafts from."""

    def holds(self, ids: Sequence[int]) -> bool:
        """Whether all of `ids` stand in a row within one document."""
        ...


def said(answer: Sequence[int], ends: Collection[int]) -> list[int]:
    """An answer without the special tokens at its end, which a log may keep or not."""
    ids = list(answer)
    while ids and ids[-1] in ends:
        ids.pop()
    return ids


def leakage(answers: Sequence[Sequence[int]], held: Sequence[bool]) -> dict[str, Any]:
    """Counts and shares of the answers that are held."""
    tokens = sum(len(answer) for answer in answers)
    leaked = sum(len(answer) for answer, is_held in zip(answers, held, strict=True) if is_held)
    return {"answers": sum(held), "share": sum(held) / len(held), "token_share": leaked / max(tokens, 1)}
