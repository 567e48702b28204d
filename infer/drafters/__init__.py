"""Learned drafters and the controls that every measurement offers."""

from draftsmith.infer.drafters.sd2 import SD2
from draftsmith.infer.drafters.small_lm import SmallLM

__all__ = ["SD2", "SmallLM"]
