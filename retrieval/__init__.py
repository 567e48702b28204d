"""Drafters that retrieve their drafts from existing text: PLD, REST, DReSD."""

from draftsmith.retrieval.dresd.drafter import Dresd
from draftsmith.retrieval.pld import PromptLookup
from draftsmith.retrieval.rest.drafter import Rest

__all__ = ["Dresd", "PromptLookup", "Rest"]
