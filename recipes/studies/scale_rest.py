"""`draftsmith store scale`: rest stores of any size from little text, built and queried, with time, memory and growth.

Options and the table; what is measured is retrieval's (rest_scale.py).
"""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Sequence


def scale_rest(
    *,
    store: str,
    out: str,
    tokens: Sequence[int] = (100_000_000,),
    steps: int = 4000,
    chunk_tokens: int = 16_000_000,
    max_mapped_mb: float = 256,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Build and query large stores made of a small one's documents, and print what it took.

    Example: draftsmith store scale --store STORE --out big --tokens 1000000 10000000

    Args:
        store: a rest store whose documents are varied.
        out: folder of the large store; it is deleted afterwards.
        tokens: sizes of large stores; with two or more of them, how the time to build grows is told.
        steps: how many drafts are timed.
        chunk_tokens: tokens per segment.
        max_mapped_mb: the drafter's option of that name.
        seed: of the variation.
        json: print one JSON object on the last line.
    """
    from draftsmith.recipes.studies.rest_scale import growth, measure

    options = {"max_mapped_mb": max_mapped_mb}
    found = []
    for size in tokens:
        print(f"{size:,} tokens", file=sys.stderr, flush=True)
        found.append(measure(store, out, size, steps, options, seed, chunk_tokens))
    for name in found[0]:
        print(f"{name.replace('_', ' '):<24}" + "".join(f"{figures[name]:>18,.3f}" for figures in found))
    told: dict[str, object] = {"sizes": found} if len(found) > 1 else dict(found[0])
    if len(set(tokens)) > 1:
        told["build_growth"] = growth(tokens, [figures["build_cpu_s"] for figures in found])
        told["query_growth"] = growth(tokens, [figures["propose_p50_ms"] for figures in found])
        print(f"building grows with (n log n) to the power of {told['build_growth']:.2f}")
    if json:
        print(json_module.dumps(told))
