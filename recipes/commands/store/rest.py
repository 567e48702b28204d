"""`draftsmith store build rest`, `info` and `verify`: make a store for the rest drafter, and look at any store.

Options and lines to print; reading and building are retrieval's. What changes a store is in store_edit.py.
"""

from __future__ import annotations

import json as json_module
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.infer.text.records import OnBad, ReadReport
from draftsmith.retrieval.store.documents import Content

if TYPE_CHECKING:
    from draftsmith.retrieval.store.segments import Segment


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

    Example: draftsmith store build rest --data answers.jsonl --tokenizer MODEL --out STORE

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
    from draftsmith.retrieval.rest.build import build_store
    from draftsmith.retrieval.store.documents import open_reader, stamp

    reader = open_reader(data, find_tokenizer(tokenizer, target), template, content, on_bad, limit)
    began = time.perf_counter()
    build_store(Path(out), reader, template, _provenance(data), stamp(data), chunk_tokens, _progress(began))
    tell(out, reader.report, json, seconds=time.perf_counter() - began)


def info(store: str, json: bool = False) -> None:
    """Show what a store holds, whatever its kind.

    Example: draftsmith store info STORE

    Args:
        store: the store's folder.
        json: print one JSON object on the last line.
    """
    from draftsmith.retrieval.store.format import all_parts, check_parts, read_manifest

    check_parts(Path(store).expanduser(), all_parts(read_manifest(store)))
    tell(store, None, json)


def verify(store: str, json: bool = False) -> None:
    """Read a store through and check every file against its checksum.

    Example: draftsmith store verify STORE

    Args:
        store: the store's folder.
        json: print one JSON object on the last line.
    """
    from draftsmith.retrieval.store.format import all_parts, check_parts, figures, read_manifest

    said = read_manifest(store)
    check_parts(Path(store).expanduser(), all_parts(said), "checksums")
    files, size = len(all_parts(said)), figures(said)["bytes"]
    if json:
        print(json_module.dumps({"files": files, "bytes": size}))
    else:
        print(f"{store}: {files} files, {size:,} bytes, all as they were written")


def find_tokenizer(tokenizer: str | None, target: str | None) -> Any:
    """The tokenizer that was named, or the target's."""
    from draftsmith.infer.text.templates import load_tokenizer

    name = tokenizer or target
    if name is None:
        raise ValueError("name the tokenizer: --tokenizer DIR, or --target DIR")
    return load_tokenizer(name)


def tell(store: str, report: ReadReport | None, json: bool, **more: float) -> None:
    """What was read, and what the store holds now."""
    from draftsmith.retrieval.store.format import figures, read_manifest

    said = read_manifest(store)
    for line in [] if report is None else report.lines():
        print(line)
    known = {**figures(said), **more}
    told = ", ".join(f"{name} {value if isinstance(value, str) else f'{value:,.6g}'}" for name, value in known.items())
    print(f"{store}: {told}")
    template = said.get("template_name") or (said.get("template") or {}).get("name", "none")
    print(f"tokenizer {str(said.get('tokenizer'))[:12]}, template {template}")
    if json:
        print(json_module.dumps({**known, "store": store, "manifest": said}))


def _provenance(data: list[str]) -> dict[str, Any]:
    from importlib.metadata import version

    built = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"data": data, "draftsmith": version("draftsmith"), "built": built}


def _progress(began: float) -> Any:
    written = 0

    def on_segment(segment: Segment) -> None:
        nonlocal written
        written += segment.tokens
        rate = written / (time.perf_counter() - began)
        print(f"segment {segment.name}: {written:,} tokens, {rate:,.0f} tokens/s", file=sys.stderr, flush=True)

    return on_segment
