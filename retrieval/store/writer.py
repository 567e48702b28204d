"""Writing stores: built in segments and resumable, appended to, merged, and cleared of documents.

Every file gets a name that no published store.json has used and is written beside and renamed; then one replaced
store.json publishes all of them together. So a killed writer leaves either the old store or the new one, and readers
of the old one go on reading it. Files that nothing names are deleted by the writer that superseded them or, after a
crash, by the next. One writer at a time, by a lock that dies with its process.

What a segment holds besides tokens is the kind's own business: `make_parts(stream, starts)` gives its arrays.
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
from draftsmith.retrieval.store.segments import Manifest, Segment, Store
from draftsmith.retrieval.store.token_stream import join

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
    """Build a store at `out`, in OUT.part until it is whole. `job` is what the result depends on: a run that was killed
    is resumed where the same job is asked for again, and begun anew where another one is."""
    if out.exists():
        raise ValueError(f"{out} exists already: name a new folder, or append to it")
    part = unfinished(out)
    with locked(part):
        if not ((part / MANIFEST).exists() and _progress(part).get("job") == _key(job)):
            (part / MANIFEST).unlink(missing_ok=True)
            taken, manifest = _resume(part, manifest, job)
            began = time.perf_counter() - manifest.build.get("seconds", 0.0)
            segments = _Segments(part, manifest, make_parts, chunk_tokens)
            for records in segments.write(batches(taken)):
                on_segment(manifest.segments[-1])
                taken += records
                manifest.build["seconds"] = round(time.perf_counter() - began, 3)
                write_json(
                    part / PROGRESS,
                    {"job": _key(job), "taken": taken, "manifest": {"kind": manifest.kind, **manifest.to_json()}},
                )
            if not manifest.segments:
                raise ValueError("no document with a token in it: there is nothing to build a store of")
            _clear(part, manifest)
            manifest.build["seconds"] = round(time.perf_counter() - began, 3)
            manifest.publish(part)
        manifest = Manifest.read(part)
        os.rename(part, out)
        (out / PROGRESS).unlink(missing_ok=True)
    return manifest


def _resume(part: Path, manifest: Manifest, job: dict[str, Any]) -> tuple[int, Manifest]:
    """How many records were dealt with already, and the segments that hold them."""
    progress = _progress(part)
    if progress.get("job") != _key(job):
        return 0, manifest
    known = Manifest.from_json(progress["manifest"], str(part / PROGRESS))
    resumed = replace(manifest, segments=known.segments, next_segment=known.next_segment, build=known.build)
    return int(progress["taken"]), resumed


def _progress(part: Path) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads((part / PROGRESS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return told


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
    """Rewrite the segments that hold a document to `drop` (given {id, time}) without it; returns how many went."""
    with _editing(path) as manifest:
        store = Store.open(path)
        before, kept, manifest.segments = manifest.documents, manifest.segments, []
        for segment, opened in zip(kept, store.segments):
            if not any(drop(told) for told, _ in store.segment_documents(opened)):
                manifest.segments.append(segment)
                continue
            left = ((told, ids) for told, ids in store.segment_documents(opened) if not drop(told))
            for _ in _Segments(path, manifest, make_parts, 1 << 62).write(_stored(left)):
                pass
        if not manifest.segments:
            raise ValueError(f"nothing would be left in {path}: delete the folder instead")
    return manifest, before - manifest.documents


@contextmanager
def _editing(path: Path) -> Iterator[Manifest]:
    """The manifest of a store under its lock; what the block made of it is published, if the block ends well."""
    Manifest.read(path)
    with locked(path):
        manifest = Manifest.read(path)
        _clear(path, manifest)
        yield manifest
        manifest.publish(path)
        _clear(path, manifest)


def _clear(path: Path, manifest: Manifest) -> None:
    """Delete what `manifest` does not name; who has mapped a file keeps it."""
    named = {part.file for part in manifest.all_parts} | {MANIFEST, PROGRESS, LOCK}
    for file in path.iterdir():
        if file.is_file() and file.name not in named:
            file.unlink()


def _stored(documents: Iterator[tuple[dict[str, Any], np.ndarray]]) -> Iterator[list[Document]]:
    return ([Document(told["id"], ids, told.get("time"))] for told, ids in documents)


@dataclass(slots=True)
class _Segments:
    """Writes documents as segments of about `chunk_tokens` into `manifest`, never more than one in memory."""

    folder: Path
    manifest: Manifest
    make_parts: MakeParts
    chunk_tokens: int

    def write(self, batches: Iterator[list[Document]]) -> Iterator[int]:
        """After each segment: the number of batches that it took."""
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
        told = [{"id": document.id} | ({} if document.time is None else {"time": document.time})
                for document in documents]  # fmt: skip
        lines = "".join(json.dumps(row) + "\n" for row in told).encode()
        arrays = {"tokens": stream, "starts": starts, **self.make_parts(stream, starts)}
        parts = {kind: write_array(self.folder, f"{name}.{kind}", array) for kind, array in arrays.items()}
        parts["documents"] = write_array(self.folder, f"{name}.documents", np.frombuffer(lines, np.uint8))
        self.manifest.segments.append(Segment(name, len(documents), len(stream) - len(documents), parts))
        self.manifest.next_segment += 1
