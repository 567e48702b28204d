"""Keyed randomness: every uniform is a function of (seed, row, position, purpose, index) and of nothing else.

So a row's output does not depend on its batch, on earlier drafts, or on the process. Drafting and verification use
different purposes and never share a number. They do share the noise of the target's own draws, on purpose: race.py.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


def uniform(seed: int, row: str, position: int, purpose: str, index: int = 0) -> float:
    """A number in [0, 1) with 53 random bits."""
    return (key(seed, row, position, f"{purpose}\x1f{index}", size=8) >> 11) * 2.0**-53


def key(seed: int, row: str, position: int, purpose: str, size: int = 16) -> int:
    """A number of `size` bytes that stands for its arguments, to seed a generator with."""
    name = f"{seed}\x1f{row}\x1f{position}\x1f{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=size).digest(), "big")


@dataclass(frozen=True, slots=True)
class StepRng:
    """One row's stream at one step; `position` is that of the first token still to be decided."""

    seed: int
    row: str
    position: int

    def uniform(self, depth: int, purpose: str, index: int = 0) -> float:
        """The uniform for the token `depth` positions after the prefix."""
        return uniform(self.seed, self.row, self.position + depth, purpose, index)

    def step_uniform(self, purpose: str, index: int = 0) -> float:
        """A uniform of this step only, for rules that read numbers beyond the accepted point.

        Keyed by position, such a number would come back in the next step, after it has decided where that step starts.
        """
        return uniform(self.seed, self.row, self.position, f"step {purpose}", index)
