"""`draftsmith store quality`: how good a dense store is, measured without decoding."""

from __future__ import annotations

from json import dumps
from typing import Any

import numpy as np

from draftsmith.infer.text.records import read_records
from draftsmith.infer.text.templates import find_template
from draftsmith.recipes.cli.ranges import IntFrom1
from draftsmith.recipes.commands.store.build import render_all
from draftsmith.retrieval.dresd.index import IndexKind


def quality(
    store: str,
    *,
    target: str,
    data: list[str],
    indexes: list[IndexKind] | None = None,
    positions: IntFrom1 = 1_000,
    template: str = "auto",
    limit: IntFrom1 | None = None,
    dtype: str = "auto",
    device: str = "auto",
    json: bool = False,
) -> None:
    """Measure a dense store: do keys find themselves, does the index find the nearest, are continuations right?

    Example: draftsmith store quality STORE --target MODEL --data held_out.jsonl

    Args:
        store: the store's folder.
        target: folder or Hub name of the model that it was built for.
        data: text that is not in the store, ideally the target's own answers to other prompts.
        indexes: kinds of index to compare with exact search on the store's keys.
        positions: how many positions to query.
        template: how the target is served: auto (chat, or plain without one), or as `store build dresd` takes it.
        limit: the most held-out records to read.
        dtype: of the target's weights.
        device: where the target runs.
        json: print one JSON object on the last line.
    """
    from draftsmith.infer.models.load import load_target
    from draftsmith.retrieval.dresd import quality as measures
    from draftsmith.retrieval.dresd.drafter import check_fits
    from draftsmith.retrieval.dresd.index import stored_keys
    from draftsmith.retrieval.dresd.store import DresdStore

    opened = DresdStore(store)
    loaded = load_target(target, dtype=dtype, device=device)
    if loaded.tokenizer is None:
        raise ValueError(f"{target} has no tokenizer: save one in its folder")
    check_fits(opened, loaded)
    form = find_template(template, loaded.tokenizer)
    text = measures.hold_out(opened, loaded, list(render_all(read_records(data, limit=limit), form, {})))
    found: dict[str, Any] = {
        "store": {
            key: opened.manifest[key] for key in ("keys", "documents", "index", "dims", "variance_held", "build")
        },
        "self_recall_mrr": measures.self_recall(opened, positions),
        "held_out": measures.held_out_recall(opened, text, sample=positions),
        "query_ms": measures.query_ms(opened.index, text.keys_NK),
    }
    if indexes:
        keys_NK = stored_keys(opened.index, np.arange(len(opened)))
        found["indexes"] = [measures.index_recall(keys_NK, text.keys_NK[:positions], kind) for kind in indexes]
    print(dumps(found) if json else "\n".join(_lines(found)))


def _lines(found: dict[str, Any]) -> list[str]:
    """One figure per line."""
    store, held_out = found["store"], found["held_out"]
    build, query = store["build"], found["query_ms"]
    lines = [
        f"{store['keys']} keys of {store['documents']} documents, index {store['index']}, {store['dims']} dimensions",
        f"embedding: {build['embedded_positions_per_s']} positions/s; whole build {build['seconds']} s",
        f"a stored key finds itself: mean reciprocal rank {found['self_recall_mrr']:.4f}",
        f"held-out positions with a draft: {held_out['with_a_draft']:.3f} of {held_out['positions']}",
    ]
    for name, what in (("best", "the best draft"), ("any", "any draft")):
        shares = ", ".join(f"{n}: {share:.3f}" for n, share in held_out[name].items())
        lines.append(f"the next n tokens are right in {what}: {shares}")
    lines.append(f"one query: {query['p50']} ms (median), {query['p99']} ms (99th percentile)")
    for index in found.get("indexes", ()):
        lines.append(
            f"{index['index']}: recall@10 {index['recall@10']:.4f}, query {index['query_ms']['p50']} ms, exact "
            f"{index['exact_query_ms']['p50']} ms, built in {index['build_s']} s"
        )
    return lines
