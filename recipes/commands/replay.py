"""`draftsmith replay`: how well drafters predict your recorded answers; no target is needed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from json import dumps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from draftsmith.recipes.cli.ranges import FloatFrom0, IntFrom0, IntFrom1


def replay(
    *,
    data: list[str],
    tokenizer: str,
    drafters: str,
    questions: str = "",
    split: str = "",
    arrival: bool = False,
    store_out: str = "",
    latency: str = "",
    batch_sizes: Sequence[IntFrom1] = (1, 4, 8, 16, 32),
    template: str = "auto",
    temperature: FloatFrom0 = 0.0,
    nodes: IntFrom1 = 64,
    depth: IntFrom1 = 64,
    limit: IntFrom1 | None = None,
    on_bad: Literal["raise", "skip"] = "raise",
    seed: IntFrom0 = 0,
    json: bool = False,
) -> None:
    """Replay recorded answers and show how much of them each drafter would have drafted.

    Example: draftsmith replay --data logs.jsonl --tokenizer DIR --drafters pld,rest --split time:0.9 --arrival

    Args:
        data: recorded answers: files, folders or `datasets` names; token ids are used if given. Also Spec-Bench's and
            FastChat's answer files, and answers/NAME.jsonl of `bench --out`.
        tokenizer: folder or Hub name of the target's tokenizer.
        drafters: comma-separated, such as pld,rest:STORE,small:MODEL; with --split, `rest` uses the split's store, and
            without a store it needs --arrival.
        questions: the questions of answer files; by default questions.jsonl or question.jsonl beside them or one
            folder up.
        split: index the earlier part and replay the later: time:0.9 or time:2026-05-01 by the rows' times, rows:0.9 by
            their order.
        arrival: replay in order of arrival, and let drafters index each answer after it was replayed.
        store_out: new folder to keep the store of the split in.
        latency: file of pass costs (`draftsmith plan --out`), to predict speedup and break-even.
        batch_sizes: batch sizes of those predictions.
        template: how conversations were rendered: auto (chat, or plain without one), chat (the tokenizer's own), plain,
            a format with {prompt}, or a FastChat name.
        temperature: the temperature of the answers; above 0 only drafters that do not sample can be replayed.
        nodes: maximum nodes of a draft.
        depth: maximum depth of a draft.
        limit: read at most this many records.
        on_bad: rows that cannot be read: raise an error, or skip and count them.
        seed: random seed of the intervals.
        json: print one JSON object on the last line.
    """
    from draftsmith.infer.contract.protocols import Budget
    from draftsmith.infer.costs.pass_costs import Costs
    from draftsmith.infer.files.locations import check_writable
    from draftsmith.infer.measure import tables
    from draftsmith.infer.measure.predicted import check_tokenizer
    from draftsmith.infer.measure.recordings import arrived, parse_split, recordings, split_recordings, with_questions
    from draftsmith.infer.measure.replay import Replay
    from draftsmith.infer.text.records import ReadReport, read_records
    from draftsmith.infer.text.templates import find_template, load_tokenizer
    from draftsmith.recipes.cli.inputs import leaves_open, parse_drafters
    from draftsmith.recipes.cli.progress import progress
    from draftsmith.retrieval.rest.build import store_answers

    if not drafters:
        raise ValueError("give --drafters, such as pld or rest:STORE")
    if store_out and not split:
        raise ValueError("--store_out needs a split: give --split as well")
    if store_out:
        check_writable(store_out, folder=True)
    asked, costs = parse_split(split) if split else None, Costs.load(latency) if latency else None
    loaded = load_tokenizer(tokenizer)
    if costs is not None:
        check_tokenizer(costs, loaded, latency)
    form = find_template(template, loaded)
    report = ReadReport()
    records = read_records(data, limit=limit, need="answers", on_bad=on_bad, report=report)
    streams = recordings(with_questions(records, questions, report), form)
    with ExitStack() as stack:
        parts = split_recordings(streams, asked) if asked else None
        path = _path(store_out, stack) if parts else None
        chosen = parse_drafters(drafters, {"rest": {"store": str(path)}} if path else {})
        if parts and path and (store_out or leaves_open(drafters, "rest")):
            store_answers(path, parts.earlier, form, form.name, {"data": data, "split": parts.to_json()})
        run = Replay(
            parts.later if parts else arrived(streams) if arrival else streams,
            len(loaded),
            loaded,
            temperature=temperature,
            budget=Budget(nodes, depth),
            seed=seed,
            arrival=arrival,
            costs=costs,
            batch_sizes=batch_sizes,
        )
        results = run.results(chosen, lambda done, total, name: progress(f"{name}: {done}/{total}", last=done == total))
    results["template"] = form.name
    results["split"] = parts.to_json() if parts else None
    if json:
        if report.used < report.rows:
            print(*report.lines(), sep="\n", file=sys.stderr)
        for line in tables.leakage_warnings(results):
            print(line, file=sys.stderr)
        print(dumps(results, ensure_ascii=False))
        return
    for line in report.lines():
        print(line)
    tables.show(tables.replay_tables(results))


def _path(store_out: str, stack: ExitStack) -> Path:
    """Folder for the store of the split: the one asked for, or a temporary one that `stack` removes."""
    if store_out:
        return Path(store_out).expanduser()
    return Path(stack.enter_context(TemporaryDirectory())) / "store"
