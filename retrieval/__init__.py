"""Drafting from text that is already there."""

from draftsmith.retrieval.dresd.drafter import Dresd
from draftsmith.retrieval.pld import PromptLookup
from draftsmith.retrieval.rest.drafter import Rest

__all__ = ["Dresd", "PromptLookup", "Rest"]
