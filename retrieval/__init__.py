"""Drafters that retrieve their drafts from existing text: PLD, REST, DReSD. Each is imported when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from draftsmith.retrieval.dresd.drafter import Dresd
    from draftsmith.retrieval.pld import PromptLookup
    from draftsmith.retrieval.rest.drafter import Rest

__all__ = ["Dresd", "PromptLookup", "Rest"]

_MODULES = {"Dresd": "dresd.drafter", "PromptLookup": "pld", "Rest": "rest.drafter"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
