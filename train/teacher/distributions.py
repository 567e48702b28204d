"""The two distributions of a chunk of positions, each form of them made when first asked for and then kept.

The draft's distribution is the softmax of its logits at `temperature`; the target's comes from a teacher (teacher.py),
at the same temperature, or as a point mass on its choice at temperature 0. Which loss compares them is not known here.

Legend: V vocabulary, C positions of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch


class TargetChunk(Protocol):
    """The target's distribution at a chunk of positions."""

    def log_probs(self, temperature: float, draft_log_CV: torch.Tensor) -> torch.Tensor:
        """[C, V] at `temperature`. Where only a part of the distribution is known, the rest has the shape of the
        draft's."""
        ...

    def choice(self) -> torch.Tensor:
        """[C] the likeliest tokens."""
        ...


@dataclass
class Distributions:
    """What a loss may read.

    Args:
        logits_CV: the draft's, at temperature 1.
        target: the target's distribution at the same positions.
        labels_C: the text's tokens.
        temperature: of both distributions; 0: the target's is a point mass on its likeliest token, and the draft's
            stays at 1.
        top_k: how many tokens a tree will try at a node.
        sharpness: what stands in for an argmax: softmax(sharpness x logits).
    """

    logits_CV: torch.Tensor
    target: TargetChunk
    labels_C: torch.Tensor
    temperature: float = 1.0
    top_k: int = 4
    sharpness: float = 1.0

    @cached_property
    def draft_log_CV(self) -> torch.Tensor:
        scaled_CV = self.logits_CV if self.temperature in (0.0, 1.0) else self.logits_CV / self.temperature
        return torch.log_softmax(scaled_CV, -1)

    @cached_property
    def draft_probs_CV(self) -> torch.Tensor:
        return self.draft_log_CV.exp()

    @cached_property
    def target_log_CV(self) -> torch.Tensor:
        return self.target.log_probs(self.temperature, self.draft_log_CV)

    @cached_property
    def target_probs_CV(self) -> torch.Tensor:
        if self.temperature == 0.0:
            point_CV = torch.zeros_like(self.logits_CV)
            return point_CV.scatter_(1, self.target.choice()[:, None], 1.0)
        return self.target_log_CV.exp()
