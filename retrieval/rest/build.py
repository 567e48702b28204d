"""Build a REST store (arXiv 2311.08252): documents -> segments, each with a backward suffix array.

retrieval/store/writer.py writes the segments and resumes a build that was killed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from draftsmith.infer.contract.arguments import at_least
from draftsmith.infer.files.workers import Progress, Workers
from draftsmith.infer.measure.recordings import Recording
from draftsmith.infer.text.rendering import Template
from draftsmith.infer.text.tokenizer import tokenizer_fingerprint
from draftsmith.retrieval.rest.suffix_array import backward_suffixes
from draftsmith.retrieval.store.documents import Content, Document, DocumentReader
from draftsmith.retrieval.store.segment_writer import CHUNK_TOKENS
from draftsmith.retrieval.store.segments import Manifest, check_ids, separator, stream_dtype
from draftsmith.retrieval.store.writer import OnSegment, build

KIND = "rest"


def make_parts(stream: np.ndarray, starts: np.ndarray) -> dict[str, np.ndarray]:
    """`stream` [N] -> {suffixes [M]}. `starts` is not needed: a separator follows each document."""
    return {"suffixes": backward_suffixes(stream, separator(stream.dtype))}


def build_store(
    out: Path,
    reader: DocumentReader,
    template_name: str,
    provenance: dict[str, Any],
    source: Any,
    chunk_tokens: int = CHUNK_TOKENS,
    on_segment: OnSegment = lambda segment: None,
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Build a store at `out` from all documents of `reader`.

    Args:
        template_name: the template's name, kept so that `append` finds it again.
        provenance: kept in store.json.
        source: identifies the data; a killed build is resumed only if it is unchanged.
        chunk_tokens: tokens per segment.
        on_segment: called after each segment.
        workers: what makes documents and segments; default: this process.
        progress: called with the records and tokens read so far.
    """
    at_least(1, chunk_tokens=chunk_tokens)
    content = reader.documents.content
    manifest = _empty_manifest(reader.template, template_name, content, provenance)
    job = {"kind": KIND, "data": source, "tokenizer": manifest.tokenizer, "template": manifest.template,
           "content": content, "chunk_tokens": chunk_tokens, "limit": reader.limit,
           "on_bad": reader.on_bad}  # fmt: skip
    return build(
        out, manifest, lambda skip: reader.records(), make_parts, job=job, chunk_tokens=chunk_tokens,
        on_segment=on_segment, make_documents=reader.documents, report=reader.report, workers=workers,
        progress=progress,
    )  # fmt: skip


def store_answers(
    out: Path, answers: Sequence[Recording], template: Template, template_name: str, provenance: dict[str, Any]
) -> Manifest:
    """Build a store at `out` from recorded answers, one document each, in their order."""
    manifest = _empty_manifest(template, template_name, "answers", provenance)

    def batches(skip: int) -> Iterator[list[Document]]:
        for one in answers[skip:]:
            ids = check_ids(one.answer, manifest.vocab_size, one.key)
            yield [Document(one.key, ids, one.time)]

    digest = hashlib.sha256()
    for one in answers:
        digest.update(np.asarray([*one.answer, -1], np.int64).tobytes())
    job = {"answers": digest.hexdigest(), "tokenizer": manifest.tokenizer, "chunk_tokens": CHUNK_TOKENS}
    return build(out, manifest, batches, make_parts, job=job)


def _empty_manifest(template: Template, template_name: str, content: Content, provenance: dict[str, Any]) -> Manifest:
    """The manifest of a store without segments, for targets with this template's tokenizer."""
    vocab_size = max(template.tokenizer.get_vocab().values()) + 1
    return Manifest(
        kind=KIND,
        tokenizer=tokenizer_fingerprint(template.tokenizer),
        vocab_size=vocab_size,
        dtype=stream_dtype(vocab_size).name,
        template=template.fingerprint(),
        template_name=template_name,
        content=content,
        provenance=provenance,
    )
