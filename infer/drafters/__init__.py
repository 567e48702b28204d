"""Learned drafters, those that learn from the target's passes, and the controls of every measurement."""

from draftsmith.infer.drafters.lookahead import Lookahead
from draftsmith.infer.drafters.recycling import Recycling
from draftsmith.infer.drafters.sd2 import SD2
from draftsmith.infer.drafters.small_lm import SmallLM

__all__ = ["SD2", "Lookahead", "Recycling", "SmallLM"]
