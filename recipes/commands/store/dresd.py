"""`draftsmith store build dresd`: a dense store from text, for one target.

Reading and rendering are infer's (records.py, templates.py); building is retrieval's (dresd_build.py).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.infer.text.records import OnBad, ReadReport, read_records
from draftsmith.infer.text.rendering import Rendered, render_record
from draftsmith.infer.text.templates import find_template
from draftsmith.retrieval.dresd.index import IndexKind

if TYPE_CHECKING:
    from draftsmith.infer.text.rendering import Template


def build_dresd(
    *,
    target: str,
    data: list[str],
    out: str,
    feature: str = "last",
    index: IndexKind = "auto",
    dims: int = 64,
    fit_positions: int = 1_000_000,
    batch_positions: int = 8_192,
    max_length: int = 2_048,
    template: str = "chat",
    template_kwargs: dict[str, Any] | None = None,
    limit: int | None = None,
    on_bad: OnBad = "raise",
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    json: bool = False,
) -> None:
    """Build a dense store of what a target says, keyed by its own states. A build that was stopped goes on.

    Example: draftsmith store build dresd --target MODEL --data answers.jsonl --out STORE

    Args:
        target: folder or Hub name of the model that will be drafted for; no other can use the store.
        data: its answers to prompts (in-distribution), or any conversations and documents; files, folders, `datasets`.
        out: the folder to come.
        feature: the states that are looked up: last (after the final norm), or layer:k (before layer k).
        index: flat is exact, hnsw a graph, ivfpq compressed; auto chooses by the number of keys.
        dims: of a key, after PCA.
        fit_positions: about so many keys fit the z-score and the PCA.
        batch_positions: positions per forward pass, padding included.
        max_length: longer sequences are embedded in parts.
        template: how the target is served: chat, plain, a format with {prompt}, or a FastChat name.
        template_kwargs: for the tokenizer's own chat template.
        limit: so many records and no more.
        on_bad: what a row that is not valid JSON or UTF-8 does.
        dtype: of the target's weights.
        device: where the target runs.
        seed: of the order of documents and of the index.
        json: print the manifest as one JSON object on the last line.
    """
    config = dict(locals())
    from draftsmith.infer.models.load import load_target
    from draftsmith.retrieval.dresd.build import build_store
    from draftsmith.retrieval.store.documents import stamp

    loaded = load_target(target, dtype=dtype, device=device)
    if loaded.tokenizer is None:
        raise ValueError(f"{target} has no tokenizer")
    report, skipped = ReadReport(), dict[str, int]()
    form = find_template(template, loaded.tokenizer, template_kwargs)

    def samples() -> Iterable[Rendered]:
        records = read_records(data, limit=limit, on_bad=on_bad, report=report)
        return render_all(records, form, skipped)

    def facts() -> dict[str, Any]:
        from draftsmith.infer.files.provenance import provenance

        said = {"name": template, "kwargs": template_kwargs, "system": None, "fingerprint": form.fingerprint()}
        return {"template": said, "provenance": provenance(sys.argv, config, seed)}

    source = {"data": stamp(data), "limit": limit}
    manifest = build_store(
        loaded,
        samples,
        Path(out),
        feature=feature,
        index=index,
        dims=dims,
        fit_positions=fit_positions,
        batch_positions=batch_positions,
        max_length=max_length,
        seed=seed,
        source=source | {"template": form.fingerprint()},
        facts=facts,
        progress=_progress,
    )
    told = report.lines() if report.rows else ["the rows were read before, by the build that was stopped"]
    print("\n".join(told + [f"skipped: {count} x {reason}" for reason, count in skipped.items()]), file=sys.stderr)
    if json:
        print(dumps(manifest))
    else:
        print(f"{out}: {manifest['keys']} keys of {manifest['dims']} dimensions, index {manifest['index']}, from")
        print(f"{manifest['documents']} answers or documents; {manifest['build']['seconds']} s")


def render_all(records: Iterable[Any], template: Template, skipped: dict[str, int]) -> Iterator[Rendered]:
    """The samples of all records; one that holds nothing that a target could have said is counted, with its reason."""
    for record in records:
        try:
            yield from render_record(template, record)
        except ValueError as problem:
            reason = str(problem)
            skipped[reason] = skipped.get(reason, 0) + 1


def _progress(done: int, total: int) -> None:
    from draftsmith.recipes.cli.progress import progress

    progress(f"{done}/{total} keys embedded", last=done == total)
