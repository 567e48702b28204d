"""Write stores of text: build (resumable), append, merge, remove documents.

Every file gets a name that no published store.json has used, and is written beside it and renamed; then one replaced
store.json publishes all files together. So a killed writer leaves either the old store or the new one, and readers of
the old one continue reading it. Files that store.json no longer names are deleted by the writer that replaced them or,
after a crash, by the next one. One writer at a time, by a lock that ends with its process.

`make_parts(stream, starts)` returns a segment's arrays besides its tokens; they depend on the kind of store.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from draftsmith.infer.files.atomic import write_json
from draftsmith.retrieval.store.documents import Document
from draftsmith.retrieval.store.format import LOCK, MANIFEST, locked, unfinished, write_array
from draftsmith.retrieval.store.segments import Manifest, Segment, Store, join

PROGRESS = "progress.json"
CHUNK_TOKENS = 16_000_000

MakeParts = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]
Batches = Callable[[int], Iterator[list[Document]]]
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
) -> Manifest:
    """Build a store in OUT.part and rename it to `out`. `job` is all that the result depends on: a killed build is
    resumed if its job is the same, and started over if not."""
    if out.exists():
        raise ValueError(f"{out} already exists: name a new folder, or append to it")
    part = unfinished(out)
    with locked(part):
        if not ((part / MANIFEST).exists() and _progress(part).get("job") == _key(job)):
            (part / MANIFEST).unlink(missing_ok=True)
            done, manifest = _resume(part, manifest, job)
            began = time.perf_counter() - manifest.build.get("seconds", 0.0)
            segments = _Segments(part, manifest, make_parts, chunk_tokens)
            for records in segments.write(batches(done)):
                on_segment(manifest.segments[-1])
                done += records
                manifest.build["seconds"] = round(time.perf_counter() - began, 3)
                write_json(
                    part / PROGRESS,
                    {"job": _key(job), "taken": done, "manifest": {"kind": manifest.kind, **manifest.to_json()}},
                )
            if not manifest.segments:
                raise ValueError("the data has no document with tokens: nothing to build a store from")
            _clear(part, manifest)
            manifest.build["seconds"] = round(time.perf_counter() - began, 3)
            manifest.publish(part)
        manifest = Manifest.read(part)
        os.rename(part, out)
        (out / PROGRESS).unlink(missing_ok=True)
    return manifest


def _resume(part: Path, manifest: Manifest, job: dict[str, Any]) -> tuple[int, Manifest]:
    """How many records are already in segments, and the manifest with those segments."""
    progress = _progress(part)
    if progress.get("job") != _key(job):
        return 0, manifest
    known = Manifest.from_json(progress["manifest"], str(part / PROGRESS))
    resumed = replace(manifest, segments=known.segments, next_segment=known.next_segment, build=known.build)
    return int(progress["taken"]), resumed


def _progress(part: Path) -> dict[str, Any]:
    try:
        progress: dict[str, Any] = json.loads((part / PROGRESS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return progress


def _key(job: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()


def append(
    path: Path, batches: Batches, make_parts: MakeParts, *, chunk_tokens: int = CHUNK_TOKENS
) -> tuple[Manifest, int]:
    """Add documents as new segments, published together; returns how many were added."""
    with _editing(path) as manifest:
        before = manifest.documents
        for _ in _Segments(path, manifest, make_parts, chunk_tokens).write(batches(0)):
            pass
    return manifest, manifest.documents - before


def merge(path: Path, make_parts: MakeParts, *, chunk_tokens: int = CHUNK_TOKENS) -> Manifest:
    """Rewrite the store in as few segments as its documents fit in."""
    with _editing(path) as manifest:
        store = Store.open(path)
        manifest.segments = []
        for _ in _Segments(path, manifest, make_parts, chunk_tokens).write(_stored(store.documents())):
            pass
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
            for _ in _Segments(path, manifest, make_parts, 1 << 62).write(_stored(left)):
                pass
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


@dataclass(slots=True)
class _Segments:
    """Writes documents as segments of about `chunk_tokens` into `manifest`, with at most one segment in memory."""

    folder: Path
    manifest: Manifest
    make_parts: MakeParts
    chunk_tokens: int

    def write(self, batches: Iterator[list[Document]]) -> Iterator[int]:
        """Yields, after each segment, the number of batches in it."""
        documents: list[Document] = []
        tokens = records = 0
        for batch in batches:
            records += 1
            dtype = np.dtype(self.manifest.dtype)
            documents.extend(replace(document, ids=document.ids.astype(dtype)) for document in batch)
            tokens += sum(len(document.ids) for document in batch)
            if tokens >= self.chunk_tokens:
                self._flush(documents)
                yield records
                documents, tokens, records = [], 0, 0
        if documents:
            self._flush(documents)
            yield records

    def _flush(self, documents: Sequence[Document]) -> None:
        name = f"{self.manifest.next_segment:06d}"
        stream, starts = join([document.ids for document in documents], np.dtype(self.manifest.dtype))
        metas = [{"id": document.id} | ({} if document.time is None else {"time": document.time})
                 for document in documents]  # fmt: skip
        lines = "".join(json.dumps(meta) + "\n" for meta in metas).encode()
        arrays = {"tokens": stream, "starts": starts, **self.make_parts(stream, starts)}
        parts = {kind: write_array(self.folder, f"{name}.{kind}", array) for kind, array in arrays.items()}
        parts["documents"] = write_array(self.folder, f"{name}.documents", np.frombuffer(lines, np.uint8))
        self.manifest.segments.append(Segment(name, len(documents), len(stream) - len(documents), parts))
        self.manifest.next_segment += 1
