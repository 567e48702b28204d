"""How many positions a model takes."""

from __future__ import annotations

from typing import Any


def max_positions(config: Any) -> int:
    """The number of positions that the model takes.

    If the rotary embedding depends on the length of the call, only up to where it begins to: beyond that, a token's
    distribution depends on how the text was cut into calls, and decoding could not be lossless."""
    names = ("max_position_embeddings", "n_positions")
    limit = next((int(size) for name in names if (size := getattr(config, name, 0) or 0) > 0), 1 << 20)
    rope = getattr(config, "rope_parameters", None) or {}
    for part in rope.values() if rope and all(isinstance(v, dict) for v in rope.values()) else [rope]:
        if part.get("rope_type") in ("longrope", "dynamic"):
            limit = min(limit, int(part.get("original_max_position_embeddings") or limit))
    return limit
