"""The draft vocabulary of an EAGLE-3 head: the tokens that the answers of its corpus use most.

A head spends much of its time on its output matrix, and a part of the vocabulary covers nearly all of a language's
text. What is left out is never drafted; the target still says it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from draftsmith.train.data.corpus import Corpus

CHUNK = 1 << 24


def answer_counts(corpus: Corpus, vocab_size: int) -> np.ndarray:
    """How often each token is learned."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(corpus.tokens), CHUNK):
        chunk = slice(start, start + CHUNK)
        counts += np.bincount(corpus.tokens[chunk][corpus.masks[chunk] != 0], minlength=vocab_size)
    return counts


def draft_vocabulary(corpus: Corpus, vocab_size: int, size: int, always: Iterable[int]) -> list[int]:
    """The `size` most frequent tokens, ascending, and among them `always`. Of equally frequent ones the lower ids."""
    counts = answer_counts(corpus, vocab_size)
    kept = sorted({token for token in always if 0 <= token < vocab_size})
    if size < len(kept) + 1:
        raise ValueError(
            f"--draft_vocab {size}: the target has {len(kept)} special and stop tokens, which are in it too; give more"
        )
    counts[kept] = np.iinfo(np.int64).max
    return sorted(np.argsort(-counts, kind="stable")[:size].tolist())
