"""Drafting from text that is already there."""

from draftsmith.retrieval.dresd import Dresd
from draftsmith.retrieval.pld import PromptLookup

__all__ = ["Dresd", "PromptLookup"]
