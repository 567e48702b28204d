"""Building a REST store: documents -> segments with a backward suffix array each (arXiv 2311.08252).

How segments are written, and how a build that was killed goes on, is store_writer.py's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from draftsmith.infer.text.rendering import Template
from draftsmith.infer.text.tokenizer import tokenizer_fingerprint
from draftsmith.retrieval.rest.suffix_array import backward_suffixes
from draftsmith.retrieval.store.documents import Content, DocumentReader
from draftsmith.retrieval.store.segments import Manifest
from draftsmith.retrieval.store.token_stream import separator, stream_dtype
from draftsmith.retrieval.store.writer import CHUNK_TOKENS, OnSegment, build

KIND = "rest"


def make_parts(stream: np.ndarray, starts: np.ndarray) -> dict[str, np.ndarray]:
    """`stream` [N] -> {suffixes [M]}; documents need no look, for the separator stands between them."""
    return {"suffixes": backward_suffixes(stream, separator(stream.dtype))}


def empty_manifest(template: Template, template_name: str, content: Content, provenance: dict[str, Any]) -> Manifest:
    """Of a store to come, for targets with this template's tokenizer."""
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


def build_store(
    out: Path,
    reader: DocumentReader,
    template_name: str,
    provenance: dict[str, Any],
    source: Any,
    chunk_tokens: int = CHUNK_TOKENS,
    on_segment: OnSegment = lambda segment: None,
) -> Manifest:
    """Build a store at `out` of all that `reader` gives.

    Args:
        template_name: by which the template can be found again.
        provenance: kept in store.json.
        source: what tells whether the data are still those that a killed build was reading.
        chunk_tokens: of a segment.
        on_segment: told of each.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, not {chunk_tokens}")
    manifest = empty_manifest(reader.template, template_name, reader.content, provenance)
    job = {"kind": KIND, "data": source, "tokenizer": manifest.tokenizer, "template": manifest.template,
           "content": reader.content, "chunk_tokens": chunk_tokens, "limit": reader.limit,
           "on_bad": reader.on_bad}  # fmt: skip
    return build(out, manifest, reader, make_parts, job=job, chunk_tokens=chunk_tokens, on_segment=on_segment)
