"""Keyed randomness: every uniform is a function of (seed, row, position, purpose, index) and of nothing else.

So a row's output does not depend on the batch it was in, on how many drafts were tried before, or on which process
asked. Draft and verification purposes never share a number.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


def uniform(seed: int, row: str, position: int, purpose: str, index: int = 0) -> float:
    """A number in [0, 1) with 53 random bits."""
    key = f"{seed}\x1f{row}\x1f{position}\x1f{purpose}\x1f{index}".encode()
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 11) * 2.0**-53


@dataclass(frozen=True, slots=True)
class StepRng:
    """One row's stream at one step; `position` is that of the first token still to be decided."""

    seed: int
    row: str
    position: int

    def uniform(self, depth: int, purpose: str, index: int = 0) -> float:
        """The uniform for the token `depth` places below the prefix."""
        return uniform(self.seed, self.row, self.position + depth, purpose, index)
