"""Learned drafters, those that learn from the target's passes, drafters made of others, and the controls."""

from draftsmith.infer.drafters.heads.eagle import Eagle
from draftsmith.infer.drafters.heads.hydra import Hydra
from draftsmith.infer.drafters.heads.medusa import Medusa
from draftsmith.infer.drafters.heads.mtp import MTP
from draftsmith.infer.drafters.lookahead import Lookahead
from draftsmith.infer.drafters.mixed.mixed import Mixed
from draftsmith.infer.drafters.recycling import Recycling
from draftsmith.infer.drafters.sd2 import SD2
from draftsmith.infer.drafters.small_lm import SmallLM

__all__ = ["MTP", "SD2", "Eagle", "Hydra", "Lookahead", "Medusa", "Mixed", "Recycling", "SmallLM"]
