"""Learned drafters, drafters made of others, and the controls of every measurement."""

from draftsmith.infer.drafters.mixed.mixed import Mixed
from draftsmith.infer.drafters.sd2 import SD2
from draftsmith.infer.drafters.small_lm import SmallLM

__all__ = ["SD2", "Mixed", "SmallLM"]
