"""`draftsmith store build rest` and `store build dresd`: a store from text."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.infer.files.locations import check_writable
from draftsmith.infer.files.workers import Progress, check_workers, open_workers
from draftsmith.infer.text.records import OnBad, ReadReport, read_records
from draftsmith.infer.text.rendering import Rendered, render_record
from draftsmith.infer.text.templates import find_template, load_tokenizer
from draftsmith.recipes.cli.progress import progress
from draftsmith.recipes.cli.ranges import IntFrom0, IntFrom1
from draftsmith.recipes.commands.store.info import show
from draftsmith.retrieval.dresd.index import IndexKind, Lists, check_index
from draftsmith.retrieval.store.documents import Content, open_reader, stamp

if TYPE_CHECKING:
    from draftsmith.infer.text.rendering import Template
    from draftsmith.retrieval.store.segments import Segment


def build_rest(
    *,
    data: list[str],
    out: str,
    tokenizer: str | None = None,
    target: str | None = None,
    template: str = "auto",
    content: Content = "answers",
    chunk_tokens: IntFrom1 = 16_000_000,
    limit: IntFrom1 | None = None,
    on_bad: OnBad = "raise",
    ray: str | None = None,
    ray_workers: IntFrom1 | None = None,
    json: bool = False,
) -> None:
    """Build a store for the rest drafter. Run it again to resume a build that was killed.

    Example: draftsmith store build rest --data answers.jsonl --tokenizer MODEL --out STORE

    Args:
        data: the text: files, folders or data sets on the Hub (owner/name[:split]).
        out: a new folder.
        tokenizer: folder or Hub name of the tokenizer of the targets to draft for.
        target: folder or Hub name of a target, to use its tokenizer.
        template: how conversations are rendered: auto (chat, or plain without one), chat (the tokenizer's own), plain,
            a format such as 'USER: {prompt} ASSISTANT:', or the name of a FastChat template.
        content: what to keep of a conversation: answers, or all. Plain text is always kept whole.
        chunk_tokens: tokens per segment; building holds one segment in memory (about 12 bytes per token).
        limit: the most records to read.
        on_bad: what to do with a row that is not valid JSON or UTF-8: raise, or skip (and count it).
        ray: build on many workers with Ray: local (this machine), or the HOST:PORT of a running cluster. All must see
            --out under the same path.
        ray_workers: workers of --ray; default: one per core.
        json: print one JSON object on the last line.
    """
    from draftsmith.retrieval.rest.build import build_store

    check_workers(ray, ray_workers)
    check_writable(out, folder=True)
    reader = open_reader(data, find_tokenizer(tokenizer, target), template, content, on_bad, limit)
    began = time.perf_counter()
    with open_workers(ray, ray_workers) as workers:
        build_store(
            Path(out), reader, reader.template.name, _provenance(data), stamp(data), chunk_tokens,
            _segment_progress(began), workers, _record_progress(began),
        )  # fmt: skip
    show(out, reader.report, json, seconds=time.perf_counter() - began)


def find_tokenizer(tokenizer: str | None, target: str | None) -> Any:
    """Load the named tokenizer, or the target's."""
    name = tokenizer or target
    if name is None:
        raise ValueError("name the tokenizer: --tokenizer DIR, or --target DIR")
    return load_tokenizer(name)


def _provenance(data: list[str]) -> dict[str, Any]:
    from importlib.metadata import version

    built = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"data": data, "draftsmith": version("draftsmith"), "built": built}


def _segment_progress(began: float) -> Any:
    written = 0

    def on_segment(segment: Segment) -> None:
        nonlocal written
        written += segment.tokens
        rate = written / (time.perf_counter() - began)
        progress.end()
        print(f"segment {segment.name}: {written:,} tokens, {rate:,.0f} tokens/s", file=sys.stderr, flush=True)

    return on_segment


def _record_progress(began: float) -> Progress:
    def on_records(records: int, tokens: int) -> None:
        seconds = time.perf_counter() - began
        progress(f"{records:,} rows read, {records / seconds:,.0f}/s, {tokens:,} tokens, {tokens / seconds:,.0f}/s")

    return on_records


def build_dresd(
    *,
    target: str,
    data: list[str],
    out: str,
    feature: str = "last",
    index: IndexKind = "auto",
    lists: Lists = "memory",
    dims: IntFrom1 = 64,
    fit_positions: IntFrom1 = 1_000_000,
    batch_positions: IntFrom1 = 8_192,
    max_length: IntFrom1 = 2_048,
    template: str = "auto",
    template_kwargs: dict[str, Any] | None = None,
    limit: IntFrom1 | None = None,
    on_bad: OnBad = "raise",
    dtype: str = "auto",
    device: str = "auto",
    seed: IntFrom0 = 0,
    ray: str | None = None,
    ray_workers: IntFrom1 | None = None,
    json: bool = False,
) -> None:
    """Build a dense store: a target's answers, keyed by its hidden states. Run it again to resume a stopped build.

    Example: draftsmith store build dresd --target MODEL --data answers.jsonl --out STORE

    Args:
        target: folder or Hub name of the model to draft for; no other model can use the store.
        data: its answers to prompts (in-distribution), or any conversations and documents; files, folders, `datasets`.
        out: a new folder.
        feature: the states to look up: last (after the final norm), or layer:k (before layer k).
        index: flat is exact, hnsw a graph, ivfpq compressed; auto chooses by the number of keys.
        lists: of an ivfpq index: read into memory, or left on disk, for stores larger than memory.
        dims: dimensions of a key, after PCA.
        fit_positions: about how many keys to fit the z-score and the PCA on.
        batch_positions: positions per forward pass, padding included.
        max_length: longer sequences are embedded in parts.
        template: how the target is served: auto (chat, or plain without one), chat (the tokenizer's own), plain, a
            format with {prompt}, or a FastChat name.
        template_kwargs: for the tokenizer's own chat template.
        limit: the most records to read.
        on_bad: what to do with a row that is not valid JSON or UTF-8: raise, or skip.
        dtype: of the target's weights.
        device: where the target runs.
        seed: of the order of documents and of the index.
        ray: embed, and fill an ivfpq index, on many workers with Ray: local (this machine), or the HOST:PORT of a
            running cluster. Each loads the target; all must see --out under the same path.
        ray_workers: workers of --ray; default: one per core, or per GPU.
        json: print the manifest as one JSON object on the last line.
    """
    config = dict(locals())
    for name in ("ray", "ray_workers"):  # these do not change the store
        del config[name]
    from draftsmith.infer.models.load import check_model, choose_device, load_target
    from draftsmith.retrieval.dresd.build import build_store

    check_index(index, lists)
    check_workers(ray, ray_workers)
    check_writable(out, folder=True)
    check_model(target, dtype, device)
    loaded = load_target(target, dtype=dtype, device=device)
    if loaded.tokenizer is None:
        raise ValueError(f"{target} has no tokenizer: save one in its folder")
    report, skipped = ReadReport(), dict[str, int]()
    form = find_template(template, loaded.tokenizer, template_kwargs)

    def samples() -> Iterable[Rendered]:
        records = read_records(data, limit=limit, on_bad=on_bad, report=report)
        return render_all(records, form, skipped)

    def facts() -> dict[str, Any]:
        from draftsmith.infer.files.provenance import provenance

        served = {"name": form.name, "kwargs": template_kwargs, "system": None, "fingerprint": form.fingerprint()}
        return {"template": served, "provenance": provenance(sys.argv, config | {"template": form.name}, seed)}

    kind = choose_device(device).type  # a worker sees the devices that it may use
    with open_workers(ray, ray_workers, kind == "cuda") as workers:
        manifest = build_store(
            loaded,
            samples,
            Path(out),
            feature=feature,
            index=index,
            lists=lists,
            dims=dims,
            fit_positions=fit_positions,
            batch_positions=batch_positions,
            max_length=max_length,
            seed=seed,
            source={"data": stamp(data), "limit": limit, "template": form.fingerprint()},
            facts=facts,
            progress=_key_progress("embedded"),
            filled=_key_progress("added to the index"),
            workers=workers,
            load=partial(load_target, target, dtype=dtype, device=kind),
        )
    lines = report.lines() if report.rows else ["rows: read by the build that this one resumed"]
    print("\n".join(lines + [f"skipped: {count} x {reason}" for reason, count in skipped.items()]), file=sys.stderr)
    if json:
        print(dumps(manifest))
    else:
        print(f"{out}: {manifest['keys']} keys of {manifest['dims']} dimensions, index {manifest['index']}, from")
        print(f"{manifest['documents']} answers or documents; {manifest['build']['seconds']} s")


def _key_progress(what: str) -> Callable[[int, int], None]:
    first: list[tuple[float, int]] = []

    def on_keys(done: int, total: int) -> None:
        now = time.perf_counter()
        first.append((now, done))
        rate = (done - first[0][1]) / max(now - first[0][0], 1e-9)
        left = f", {rate:,.0f}/s, {(total - done) / rate:,.0f} s left" if rate else ""
        progress(f"{done}/{total} keys {what}{left}", last=done == total)
        del first[1:]

    return on_keys


def render_all(records: Iterable[Any], template: Template, skipped: dict[str, int]) -> Iterator[Rendered]:
    """Render all records; counts in `skipped`, by reason, those without anything that a target could have emitted."""
    for record in records:
        try:
            yield from render_record(template, record)
        except ValueError as problem:
            reason = str(problem)
            skipped[reason] = skipped.get(reason, 0) + 1
