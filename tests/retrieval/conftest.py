"""Fixtures: stores of a few documents, and drafters bound to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.protocols import Budget
from draftsmith.infer.contract.row import Row
from draftsmith.infer.models.recorded_target import RecordedTarget
from draftsmith.retrieval import Rest
from draftsmith.retrieval.rest.build import make_parts
from draftsmith.retrieval.store.documents import Document
from draftsmith.retrieval.store.segments import Manifest, stream_dtype
from draftsmith.retrieval.store.writer import build

WIDE = Budget(64, 64)


def batches_of(documents: Sequence[Sequence[int]]) -> Callable[[int], Iterator[list[Document]]]:
    """Each document as a record of its own, d0, d1, ..."""
    made = [[Document(f"d{i}", np.array(ids, np.int64))] for i, ids in enumerate(documents)]
    return lambda skip: iter(made[skip:])


def write_store(
    out: Path, documents: Sequence[Sequence[int]], vocab: int = 100, chunk: int = 1 << 30, tokenizer: str = "any"
) -> Path:
    manifest = Manifest(kind="rest", tokenizer=tokenizer, vocab_size=vocab, dtype=stream_dtype(vocab).name)
    build(out, manifest, batches_of(documents), make_parts, job={}, chunk_tokens=chunk)
    return out


def propose(drafter: Rest, contexts: Sequence[Sequence[int]], budget: Budget = WIDE) -> list[Draft]:
    rows = [Row(str(i), list(context)) for i, context in enumerate(contexts)]
    drafter.open(rows)
    drafts = drafter.propose(rows, [budget] * len(rows))
    drafter.close(rows)
    return drafts


def bound(store: Path, vocab: int = 100, **kwargs: Any) -> Rest:
    drafter = Rest(str(store), **kwargs)
    drafter.bind(RecordedTarget({}, vocab))
    return drafter


def paths(draft: Draft) -> list[list[int]]:
    """The tokens from the root to each node."""
    found: list[list[int]] = []
    for token, parent in zip(draft.tokens, draft.parents):
        found.append([*([] if parent == ROOT else found[parent]), token])
    return found


@pytest.fixture
def retrieval() -> Any:
    """The functions above, by one name."""
    from types import SimpleNamespace

    return SimpleNamespace(
        Rest=Rest, batches_of=batches_of, write_store=write_store, propose=propose, bound=bound, paths=paths
    )
