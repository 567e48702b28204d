"""A rest store of answers that are in memory as token ids: what a replay's earlier part becomes.

infer/measure/recordings.py splits the answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from draftsmith.infer.measure.recordings import Recording
from draftsmith.infer.text.rendering import Template
from draftsmith.retrieval.rest.build import empty_manifest, make_parts
from draftsmith.retrieval.store.documents import Document
from draftsmith.retrieval.store.segments import Manifest
from draftsmith.retrieval.store.token_stream import check_ids
from draftsmith.retrieval.store.writer import CHUNK_TOKENS, build


def store_answers(
    out: Path,
    answers: Sequence[Recording],
    template: Template,
    template_name: str,
    provenance: dict[str, Any],
    chunk_tokens: int = CHUNK_TOKENS,
) -> Manifest:
    """Build a store at `out` with a document per answer, in their order."""
    manifest = empty_manifest(template, template_name, "answers", provenance)

    def batches(skip: int) -> Iterator[list[Document]]:
        for one in answers[skip:]:
            ids = check_ids(one.answer, manifest.vocab_size, one.key)
            yield [Document(one.key, ids, one.time)]

    digest = hashlib.sha256()
    for one in answers:
        digest.update(np.asarray([*one.answer, -1], np.int64).tobytes())
    job = {"answers": digest.hexdigest(), "tokenizer": manifest.tokenizer, "chunk_tokens": chunk_tokens}
    return build(out, manifest, batches, make_parts, job=job, chunk_tokens=chunk_tokens)
