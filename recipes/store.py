"""`draftsmith store ...`: build, look at, extend and clear the folders that retrieval drafters read.

Options and lines to print; reading is retrieval's (documents.py), and so is writing (store_writer.py).
"""

from __future__ import annotations

import json as json_module
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.infer.records import OnBad, ReadReport
from draftsmith.retrieval.documents import Content

if TYPE_CHECKING:
    from draftsmith.retrieval.documents import DocumentReader
    from draftsmith.retrieval.store import Manifest, Segment
    from draftsmith.retrieval.store_writer import MakeParts

DAY = 86_400


def build_rest(
    *,
    data: list[str],
    out: str,
    tokenizer: str | None = None,
    target: str | None = None,
    template: str = "auto",
    content: Content = "answers",
    chunk_tokens: int = 16_000_000,
    limit: int | None = None,
    on_bad: OnBad = "raise",
    json: bool = False,
) -> None:
    """Build a store for the rest drafter. A run that was killed goes on where it was when it is run again.

    Args:
        data: the text: files, folders or data sets on the Hub (owner/name[:split]).
        out: the new folder.
        tokenizer: folder or Hub name of the tokenizer of the targets to draft for.
        target: folder or Hub name of a target, whose tokenizer is taken.
        template: how conversations are served: auto (the tokenizer's own template, or plain), chat, plain, a format
            such as 'USER: {prompt} ASSISTANT:', or the name of a FastChat template.
        content: what is kept of a conversation: answers, or all of it. Plain text is kept whole.
        chunk_tokens: tokens per segment; building holds one segment in memory (about 12 bytes a token).
        limit: read so many records at most.
        on_bad: what a row that is not valid JSON or UTF-8 does: raise, or skip (it is counted).
        json: print one JSON object on the last line.
    """
    from draftsmith.infer.templates import tokenizer_fingerprint
    from draftsmith.retrieval.rest_build import make_parts
    from draftsmith.retrieval.store import Manifest
    from draftsmith.retrieval.store_writer import build
    from draftsmith.retrieval.token_stream import stream_dtype

    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, not {chunk_tokens}")
    reader = _reader(data, _tokenizer(tokenizer, target), template, content, on_bad, limit)
    served = reader.template
    manifest = Manifest(
        kind="rest",
        tokenizer=tokenizer_fingerprint(served.tokenizer),
        vocab_size=reader.vocab_size,
        dtype=stream_dtype(reader.vocab_size).name,
        template=served.fingerprint(),
        template_name=template,
        content=content,
        provenance=_provenance(data),
    )
    job = {"kind": "rest", "data": _identity(data), "tokenizer": manifest.tokenizer, "template": manifest.template,
           "content": content, "chunk_tokens": chunk_tokens, "limit": limit, "on_bad": on_bad}  # fmt: skip
    began = time.perf_counter()
    built = build(
        Path(out), manifest, reader, make_parts, job=job, chunk_tokens=chunk_tokens, on_segment=_progress(began)
    )
    _tell(out, built, reader.report, json, seconds=time.perf_counter() - began)


def info(store: str, json: bool = False) -> None:
    """Show what a store holds.

    Args:
        store: the store's folder.
        json: print one JSON object on the last line.
    """
    from draftsmith.retrieval.store import Store

    _tell(store, Store.open(store).manifest, None, json)


def verify(store: str) -> None:
    """Read a store through and check every file against its checksum.

    Args:
        store: the store's folder.
    """
    from draftsmith.retrieval.store import Store

    manifest = Store.open(store, check="checksums").manifest
    print(f"{store}: {len(manifest.all_parts)} files, {manifest.bytes:,} bytes, all as they were written")


def append(
    store: str,
    *,
    data: list[str],
    tokenizer: str | None = None,
    target: str | None = None,
    on_bad: OnBad = "raise",
    json: bool = False,
) -> None:
    """Add documents to a store; readers see all of them or none.

    Args:
        store: the store's folder.
        data: the text: files, folders or data sets.
        tokenizer: folder or Hub name of the tokenizer that the store was built with.
        target: folder or Hub name of a target with that tokenizer.
        on_bad: what a row that is not valid JSON or UTF-8 does: raise, or skip.
        json: print one JSON object on the last line.
    """
    from draftsmith.retrieval.store import Store
    from draftsmith.retrieval.store_writer import append as append_to

    opened = Store.open(store)
    known = _tokenizer(tokenizer, target)
    opened.check_tokenizer(known)
    manifest = opened.manifest
    content: Content = "all" if manifest.content == "all" else "answers"
    reader = _reader(data, known, manifest.template_name, content, on_bad, None)
    if reader.template.fingerprint() != manifest.template:
        raise ValueError(f"the store {store} was built with another template than this tokenizer's")
    reader.vocab_size = manifest.vocab_size
    manifest, added = append_to(Path(store), reader, _make_parts(manifest.kind))
    _tell(store, manifest, reader.report, json, added=added)


def merge(store: str, chunk_tokens: int = 16_000_000, json: bool = False) -> None:
    """Rewrite a store in as few segments as will do.

    Args:
        store: the store's folder.
        chunk_tokens: tokens per segment.
        json: print one JSON object on the last line.
    """
    from draftsmith.retrieval.store import Store
    from draftsmith.retrieval.store_writer import merge as merge_in

    make_parts = _make_parts(Store.open(store).manifest.kind)
    _tell(store, merge_in(Path(store), make_parts, chunk_tokens=chunk_tokens), None, json)


def remove(store: str, ids: Sequence[str] = (), keep_days: float | None = None, json: bool = False) -> None:
    """Take documents out of a store. Documents without a time have no age, and stay under --keep_days.

    Args:
        store: the store's folder.
        ids: ids of records whose documents go.
        keep_days: documents older than so many days go.
        json: print one JSON object on the last line.
    """
    from draftsmith.retrieval.store import Store
    from draftsmith.retrieval.store_writer import remove as remove_from

    if not ids and keep_days is None:
        raise ValueError("name what goes: --ids ID ..., or --keep_days N")
    make_parts = _make_parts(Store.open(store).manifest.kind)
    gone, oldest = set(ids), None if keep_days is None else time.time() - keep_days * DAY

    def drop(told: dict[str, Any]) -> bool:
        return told["id"] in gone or (oldest is not None and told.get("time", oldest) < oldest)

    manifest, removed = remove_from(Path(store), make_parts, drop)
    _tell(store, manifest, None, json, removed=removed)


def _make_parts(kind: str) -> MakeParts:
    if kind != "rest":
        raise ValueError(f"a {kind} store cannot be changed by this command")
    from draftsmith.retrieval.rest_build import make_parts

    return make_parts


def _tokenizer(tokenizer: str | None, target: str | None) -> Any:
    from draftsmith.infer.templates import load_tokenizer

    name = tokenizer or target
    if name is None:
        raise ValueError("name the tokenizer: --tokenizer DIR, or --target DIR")
    return load_tokenizer(name)


def _reader(
    data: list[str], tokenizer: Any, template: str, content: Content, on_bad: OnBad, limit: int | None
) -> DocumentReader:
    from draftsmith.retrieval.documents import DocumentReader, choose_template

    vocab_size = max(tokenizer.get_vocab().values()) + 1
    served = choose_template(template, tokenizer)
    return DocumentReader(data, served, vocab_size, content, ReadReport(), on_bad, limit)


def _identity(data: list[str]) -> list[Any]:
    """What tells whether the data are still those that a killed run was reading: names, sizes, times of change."""
    found: list[Any] = []
    for name in data:
        path = Path(name).expanduser()
        files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
        found.append([name, [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]])
    return found


def _provenance(data: list[str]) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "data": data,
        "draftsmith": version("draftsmith"),
        "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _progress(began: float) -> Any:
    written = 0

    def on_segment(segment: Segment) -> None:
        nonlocal written
        written += segment.tokens
        rate = written / (time.perf_counter() - began)
        print(f"segment {segment.name}: {written:,} tokens, {rate:,.0f} tokens/s", file=sys.stderr, flush=True)

    return on_segment


def _tell(store: str, manifest: Manifest, report: ReadReport | None, json: bool, **more: float) -> None:
    for line in [] if report is None else report.lines():
        print(line)
    figures = {"kind": manifest.kind, "documents": manifest.documents, "tokens": manifest.tokens,
               "segments": len(manifest.segments), "bytes": manifest.bytes,
               "bytes_per_token": manifest.bytes / max(manifest.tokens, 1), **more}  # fmt: skip
    told = ", ".join(
        f"{name} {value if isinstance(value, str) else f'{value:,.6g}'}" for name, value in figures.items()
    )
    print(f"{store}: {told}")
    print(f"tokenizer {manifest.tokenizer[:12]}, template {manifest.template_name}, content {manifest.content}")
    if json:
        print(json_module.dumps({**figures, "store": store, "manifest": manifest.to_json()}))
