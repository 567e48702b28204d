"""`draftsmith store append`, `merge` and `remove`: change a store of text while others read it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.infer.text.records import OnBad
from draftsmith.recipes.cli.ranges import FloatFrom0, IntFrom1
from draftsmith.recipes.commands.store.build import find_tokenizer
from draftsmith.recipes.commands.store.info import show

if TYPE_CHECKING:
    from draftsmith.retrieval.store.documents import Content

DAY = 86_400


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

    Example: draftsmith store append STORE --data yesterday.jsonl --tokenizer MODEL

    Args:
        store: the store's folder.
        data: the text: files, folders or data sets.
        tokenizer: folder or Hub name of the tokenizer that the store was built with.
        target: folder or Hub name of a target with that tokenizer.
        on_bad: what to do with a row that is not valid JSON or UTF-8: raise, or skip.
        json: print one JSON object on the last line.
    """
    from draftsmith.retrieval.rest.build import make_parts
    from draftsmith.retrieval.store.documents import open_reader
    from draftsmith.retrieval.store.segments import Store
    from draftsmith.retrieval.store.writer import append as append_to

    opened = Store.open(_changeable(store))
    loaded = find_tokenizer(tokenizer, target)
    opened.check_tokenizer(loaded)
    manifest = opened.manifest
    content: Content = "all" if manifest.content == "all" else "answers"
    reader = open_reader(data, loaded, manifest.template_name, content, on_bad)
    if reader.template.fingerprint() != manifest.template:
        raise ValueError(f"the store {store} was built with another chat template than this tokenizer has")
    reader.documents = replace(reader.documents, vocab_size=manifest.vocab_size)
    _, added = append_to(opened.path, reader, make_parts)
    show(store, reader.report, json, added=added)


def merge(store: str, chunk_tokens: IntFrom1 = 16_000_000, json: bool = False) -> None:
    """Rewrite a store in as few segments as possible.

    Example: draftsmith store merge STORE

    Args:
        store: the store's folder.
        chunk_tokens: tokens per segment.
        json: print one JSON object on the last line.
    """
    from draftsmith.retrieval.rest.build import make_parts
    from draftsmith.retrieval.store.writer import merge as merge_in

    merge_in(_changeable(store), make_parts, chunk_tokens=chunk_tokens)
    show(store, None, json)


def remove(store: str, ids: Sequence[str] = (), keep_days: FloatFrom0 | None = None, json: bool = False) -> None:
    """Remove documents from a store, by id or by age. --keep_days keeps documents without a time.

    Example: draftsmith store remove STORE --keep_days 90

    Args:
        store: the store's folder.
        ids: ids of the records whose documents to remove.
        keep_days: remove documents older than this many days.
        json: print one JSON object on the last line.
    """
    from draftsmith.retrieval.rest.build import make_parts
    from draftsmith.retrieval.store.segments import Store
    from draftsmith.retrieval.store.writer import remove as remove_from

    if not ids and keep_days is None:
        raise ValueError("name what to remove: --ids ID ..., or --keep_days N")
    named, oldest = set(ids), None if keep_days is None else time.time() - keep_days * DAY

    path = _changeable(store)
    if named:
        opened = Store.open(path)
        held = {meta["id"] for segment in opened.segments for meta, _ in opened.segment_documents(segment)}
        if absent := sorted(named - held):
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise ValueError(f"{store} holds no document with the id {absent[0]!r}{more}; nothing was removed")

    def drop(meta: dict[str, Any]) -> bool:
        return meta["id"] in named or (oldest is not None and meta.get("time", oldest) < oldest)

    _, removed = remove_from(path, make_parts, drop)
    show(store, None, json, removed=removed)


def _changeable(store: str) -> Path:
    """The store's folder; ValueError if its kind cannot be changed."""
    from draftsmith.retrieval.rest.build import KIND
    from draftsmith.retrieval.store.format import read_manifest

    kind = read_manifest(store)["kind"]
    if kind != KIND:
        raise ValueError(f"a {kind} store cannot be changed: build it again")
    return Path(store).expanduser()
