"""`draftsmith store append`, `merge` and `remove`: change a store of text while others read it.

Options and lines to print; reading is retrieval's (documents.py), and so is writing (store_writer.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.infer.text.records import OnBad
from draftsmith.recipes.commands.store.rest import find_tokenizer, tell

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
        on_bad: what a row that is not valid JSON or UTF-8 does: raise, or skip.
        json: print one JSON object on the last line.
    """
    from draftsmith.retrieval.rest.build import make_parts
    from draftsmith.retrieval.store.documents import open_reader
    from draftsmith.retrieval.store.segments import Store
    from draftsmith.retrieval.store.writer import append as append_to

    opened = Store.open(_changeable(store))
    known = find_tokenizer(tokenizer, target)
    opened.check_tokenizer(known)
    manifest = opened.manifest
    content: Content = "all" if manifest.content == "all" else "answers"
    reader = open_reader(data, known, manifest.template_name, content, on_bad)
    if reader.template.fingerprint() != manifest.template:
        raise ValueError(f"the store {store} was built with another template than this tokenizer's")
    reader.vocab_size = manifest.vocab_size
    _, added = append_to(opened.path, reader, make_parts)
    tell(store, reader.report, json, added=added)


def merge(store: str, chunk_tokens: int = 16_000_000, json: bool = False) -> None:
    """Rewrite a store in as few segments as will do.

    Example: draftsmith store merge STORE

    Args:
        store: the store's folder.
        chunk_tokens: tokens per segment.
        json: print one JSON object on the last line.
    """
    from draftsmith.retrieval.rest.build import make_parts
    from draftsmith.retrieval.store.writer import merge as merge_in

    merge_in(_changeable(store), make_parts, chunk_tokens=chunk_tokens)
    tell(store, None, json)


def remove(store: str, ids: Sequence[str] = (), keep_days: float | None = None, json: bool = False) -> None:
    """Take documents out of a store. Documents without a time have no age, and stay under --keep_days.

    Example: draftsmith store remove STORE --keep_days 90

    Args:
        store: the store's folder.
        ids: ids of records whose documents go.
        keep_days: documents older than so many days go.
        json: print one JSON object on the last line.
    """
    from draftsmith.retrieval.rest.build import make_parts
    from draftsmith.retrieval.store.writer import remove as remove_from

    if not ids and keep_days is None:
        raise ValueError("name what goes: --ids ID ..., or --keep_days N")
    gone, oldest = set(ids), None if keep_days is None else time.time() - keep_days * DAY

    def drop(told: dict[str, Any]) -> bool:
        return told["id"] in gone or (oldest is not None and told.get("time", oldest) < oldest)

    _, removed = remove_from(_changeable(store), make_parts, drop)
    tell(store, None, json, removed=removed)


def _changeable(store: str) -> Path:
    """The store's folder, if it is of a kind that can be changed."""
    from draftsmith.retrieval.rest.build import KIND
    from draftsmith.retrieval.store.format import read_manifest

    kind = read_manifest(store)["kind"]
    if kind != KIND:
        raise ValueError(f"a {kind} store cannot be changed, only built again")
    return Path(store).expanduser()
