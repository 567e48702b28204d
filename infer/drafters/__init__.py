"""Learned drafters and the controls that every measurement offers."""

from draftsmith.infer.drafters.small_lm import SmallLM

__all__ = ["SmallLM"]
