"""Drafting from text that is already there."""
