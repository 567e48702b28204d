"""Drafting from text that is already there."""

from draftsmith.retrieval.pld import PromptLookup

__all__ = ["PromptLookup"]
