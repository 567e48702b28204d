"""`draftsmith store info` and `verify`: what a store of any kind holds, and whether its files are intact."""

from __future__ import annotations

import json as json_module
from pathlib import Path

from draftsmith.infer.text.records import ReadReport


def info(store: str, json: bool = False) -> None:
    """Show what a store holds.

    Example: draftsmith store info STORE

    Args:
        store: the store's folder.
        json: print one JSON object on the last line.
    """
    from draftsmith.retrieval.store.format import all_parts, check_parts, read_manifest

    check_parts(Path(store).expanduser(), all_parts(read_manifest(store)))
    show(store, None, json)


def verify(store: str, json: bool = False) -> None:
    """Compare every file of a store with its checksum.

    Example: draftsmith store verify STORE

    Args:
        store: the store's folder.
        json: print one JSON object on the last line.
    """
    from draftsmith.retrieval.store.format import all_parts, check_parts, figures, read_manifest

    manifest = read_manifest(store)
    check_parts(Path(store).expanduser(), all_parts(manifest), "checksums")
    files, size = len(all_parts(manifest)), figures(manifest)["bytes"]
    if json:
        print(json_module.dumps({"files": files, "bytes": size}))
    else:
        print(f"{store}: {files} files, {size:,} bytes, all intact")


def show(store: str, report: ReadReport | None, json: bool, **more: float) -> None:
    """Print what was read, if anything, and what the store now holds."""
    from draftsmith.retrieval.store.format import figures, read_manifest

    manifest = read_manifest(store)
    for line in [] if report is None else report.lines():
        print(line)
    found = {**figures(manifest), **more}
    shown = (f"{name} {value if isinstance(value, str) else f'{value:,.6g}'}" for name, value in found.items())
    print(f"{store}: {', '.join(shown)}")
    template = manifest.get("template_name") or (manifest.get("template") or {}).get("name", "none")
    print(f"tokenizer {str(manifest.get('tokenizer'))[:12]}, template {template}")
    if json:
        print(json_module.dumps({**found, "store": store, "manifest": manifest}))
