"""Is the target looping? A model that repeats itself is easy to draft for, and flatters every drafter.

The measure is the share of distinct 4-grams in what plain decoding wrote for a question. What is done with a looping
question is not decided here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

LENGTH = 4


def distinct_share(turns: Iterable[Sequence[int]], length: int = LENGTH) -> float:
    """Distinct n-grams over all n-grams in the token ids of a question's turns; n-grams do not reach across turns.

    1.0 where the answers are too short to repeat anything.
    """
    seen: set[tuple[int, ...]] = set()
    count = 0
    for token_ids in turns:
        for start in range(len(token_ids) - length + 1):
            seen.add(tuple(token_ids[start : start + length]))
            count += 1
    return len(seen) / count if count else 1.0
