"""Write stores of text: build (resumable), append, merge, remove documents.

Every file gets a name that no published store.json has used, and is written beside it and renamed; then one replaced
store.json publishes all files together. So a killed writer leaves either the old store or the new one, and readers of
the old one continue reading it. Files that store.json no longer names are deleted by the writer that replaced them or,
after a crash, by the next one. One writer at a time, by a lock that ends with its process.

`make_parts(stream, starts)` returns a segment's arrays besides its tokens; they depend on the kind of store.
pipeline.py builds the segments of a new store, in this process or by many workers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from draftsmith.infer.files.workers import InProcess, Progress, Workers
from draftsmith.infer.text.records import ReadReport
from draftsmith.retrieval.store.documents import Document
from draftsmith.retrieval.store.format import LOCK, MANIFEST, locked, unfinished
from draftsmith.retrieval.store.pipeline import PROGRESS, Builder, Finished, MakeDocuments, Pipeline, as_given
from draftsmith.retrieval.store.segment_writer import CHUNK_TOKENS, Cut, Cutter, MakeParts, write_segment
from draftsmith.retrieval.store.segments import Manifest, Segment, Store

# Called with a number of records to skip, it yields the documents of each further one; for `build`, the records.
Batches = Callable[[int], Iterator[Any]]
OnSegment = Callable[[Segment], None]


def build(
    out: Path,
    manifest: Manifest,
    batches: Batches,
    make_parts: MakeParts,
    *,
    job: dict[str, Any],
    chunk_tokens: int = CHUNK_TOKENS,
    on_segment: OnSegment = lambda segment: None,
    make_documents: MakeDocuments = as_given,
    report: ReadReport | None = None,
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Build a store in OUT.part and rename it to `out`. `job` is all that the result depends on: a killed build is
    resumed if its job is the same, and started over if not.

    `make_documents`: of one record that `batches` yields; called in the workers. `report` takes its notes.
    `progress(records, tokens)`: of the records read in this run.
    """
    if out.exists():
        raise ValueError(f"{out} already exists: name a new folder, or append to it")
    part = unfinished(out)
    with locked(part):
        finished = Finished(part / PROGRESS, job)
        if not ((part / MANIFEST).exists() and finished.resumed):
            (part / MANIFEST).unlink(missing_ok=True)
            pipeline = Pipeline(batches(0), finished, chunk_tokens, report or ReadReport())
            builder = Builder(part, manifest.dtype, make_documents, make_parts)
            found = (workers or InProcess()).map(builder, pipeline.tasks(), progress, part)
            for segment in pipeline.take(found):
                on_segment(segment)
            manifest.segments = finished.segments()
            manifest.next_segment = len(manifest.segments) + 1
            if not manifest.segments:
                raise ValueError("the data has no document with tokens: nothing to build a store from")
            _clear(part, manifest)
            manifest.build["seconds"] = finished.seconds
            manifest.publish(part)
        manifest = Manifest.read(part)
        os.rename(part, out)
        (out / PROGRESS).unlink(missing_ok=True)
    return manifest


def append(
    path: Path, batches: Batches, make_parts: MakeParts, *, chunk_tokens: int = CHUNK_TOKENS
) -> tuple[Manifest, int]:
    """Add documents as new segments, published together; returns how many were added."""
    with _editing(path) as manifest:
        before = manifest.documents
        _write(path, manifest, make_parts, chunk_tokens, batches(0))
    return manifest, manifest.documents - before


def merge(path: Path, make_parts: MakeParts, *, chunk_tokens: int = CHUNK_TOKENS) -> Manifest:
    """Rewrite the store in as few segments as its documents fit in."""
    with _editing(path) as manifest:
        store = Store.open(path)
        manifest.segments = []
        _write(path, manifest, make_parts, chunk_tokens, _stored(store.documents()))
    return manifest


def remove(path: Path, make_parts: MakeParts, drop: Callable[[dict[str, Any]], bool]) -> tuple[Manifest, int]:
    """Rewrite the segments with documents to `drop` (called with {id, time}); returns how many were removed."""
    with _editing(path) as manifest:
        store = Store.open(path)
        before, kept, manifest.segments = manifest.documents, manifest.segments, []
        for segment, opened in zip(kept, store.segments):
            if not any(drop(meta) for meta, _ in store.segment_documents(opened)):
                manifest.segments.append(segment)
                continue
            left = ((meta, ids) for meta, ids in store.segment_documents(opened) if not drop(meta))
            _write(path, manifest, make_parts, 1 << 62, _stored(left))
        if not manifest.segments:
            raise ValueError(f"no document would be left in {path}: delete the folder instead")
    return manifest, before - manifest.documents


@contextmanager
def _editing(path: Path) -> Iterator[Manifest]:
    """A store's manifest, under the store's lock; the changed manifest is published unless the block raises."""
    Manifest.read(path)
    with locked(path):
        manifest = Manifest.read(path)
        _clear(path, manifest)
        yield manifest
        manifest.publish(path)
        _clear(path, manifest)


def _clear(path: Path, manifest: Manifest) -> None:
    """Delete files that `manifest` does not name; readers that have mapped one keep it."""
    named = {part.file for part in manifest.all_parts} | {MANIFEST, PROGRESS, LOCK}
    for file in path.iterdir():
        if file.is_file() and file.name not in named:
            file.unlink()


def _stored(documents: Iterator[tuple[dict[str, Any], np.ndarray]]) -> Iterator[list[Document]]:
    return ([Document(meta["id"], ids, meta.get("time"))] for meta, ids in documents)


def _write(
    folder: Path, manifest: Manifest, make_parts: MakeParts, chunk_tokens: int, batches: Iterator[list[Document]]
) -> None:
    """Write documents as further segments of `manifest`, with at most one in memory."""
    cutter = Cutter(chunk_tokens, manifest.next_segment)

    def write(cut: Cut | None) -> None:
        if cut is not None:
            manifest.segments.append(write_segment(folder, np.dtype(manifest.dtype), make_parts, cut))

    for batch in batches:
        write(cutter.add(batch))
    write(cutter.rest())
    manifest.next_segment = cutter.number
