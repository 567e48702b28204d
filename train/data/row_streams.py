"""Random streams of a batch's rows: they depend on the seed and on a row's number in the run, and not on which rank or
micro-batch the row falls to. So a run draws the same on any number of ranks.

Legend: B rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def row_generators(rows: Sequence[int], seed: int, purpose: str, device: torch.device) -> list[torch.Generator]:
    """A generator for each of the rows numbered `rows`, at the start of its stream for `purpose`."""
    return [torch.Generator(device).manual_seed(_stream(row, seed, purpose)) for row in rows]


def _stream(row: int, seed: int, purpose: str) -> int:
    digest = hashlib.blake2b(f"{seed} {row} {purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
