"""How likely a drawn token is accepted, learned from a row's own verdicts while it is decoded.

Whether a token is drawn may depend on the distribution that it would be drawn from, never on the token. So this looks
at the distribution alone: a logistic regression on how concentrated it is, sum(draft_probs ** 2), which is the
confidence that a draw from it has on average. It is updated after every verdict and forgets, so it follows the text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# Decay per observation.
KEPT = 0.99
# Before the first verdict: the log-odds of acceptance at no concentration, and what full concentration adds; and how
# many observations' worth of information each of the two counts for.
PRIOR = (0.7, 1.5)
PRIOR_WEIGHT = (2.0, 1.0)
# The mean concentration of drafts' distributions at temperatures from 0.5 to 1.
USUAL = 0.4


def concentration(draft_probs: torch.Tensor) -> float:
    """Between 0 (spread over many tokens) and 1 (certain). [V] or [ids], sums to one."""
    return float((draft_probs.double() ** 2).sum())


@dataclass(slots=True)
class Acceptance:
    """`offset` and `slope` are the coefficients, `start` those before the first verdict; [[a, b], [b, c]] is the
    information about them."""

    offset: float = PRIOR[0]
    slope: float = PRIOR[1]
    a: float = PRIOR_WEIGHT[0]
    b: float = 0.0
    c: float = PRIOR_WEIGHT[1]
    start: tuple[float, float] = PRIOR

    @classmethod
    def expecting(cls, accepted: float) -> Acceptance:
        """Before the first verdict, where this share was accepted elsewhere."""
        offset = math.log(accepted / (1 - accepted)) - PRIOR[1] * USUAL
        return cls(offset, start=(offset, PRIOR[1]))

    def of(self, concentration: float) -> float:
        """The probability that a draw from a distribution of this concentration is accepted, if its parent is."""
        return 1 / (1 + math.exp(-max(min(self.offset + self.slope * concentration, 30.0), -30.0)))

    def observe(self, concentration: float, accepted: bool) -> None:
        """One step of Newton's method: old observations fade, and the prior comes back for what fades."""
        self.forget(1 - KEPT)
        expected = self.of(concentration)
        weight = max(expected * (1 - expected), 0.05)
        self.a += weight
        self.b += weight * concentration
        self.c += weight * concentration**2
        self._move(accepted - expected, (accepted - expected) * concentration)

    def forget(self, share: float) -> None:
        """Let this share of the information fade, and move as far towards the prior as that says."""
        self.a, self.b, self.c = (1 - share) * self.a, (1 - share) * self.b, (1 - share) * self.c
        back = [share * weight for weight in PRIOR_WEIGHT]
        self.a, self.c = self.a + back[0], self.c + back[1]
        self._move(back[0] * (self.start[0] - self.offset), back[1] * (self.start[1] - self.slope))

    def _move(self, by_offset: float, by_slope: float) -> None:
        """Solve [[a, b], [b, c]] * step = (by_offset, by_slope)."""
        scale = self.a * self.c - self.b**2
        self.offset += (self.c * by_offset - self.b * by_slope) / scale
        self.slope += (self.a * by_slope - self.b * by_offset) / scale
