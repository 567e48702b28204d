"""`draftsmith replay`: how well drafters predict your recorded answers; no target is needed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from json import dumps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from draftsmith.infer.rules.named import DEFAULT, RuleName
from draftsmith.recipes.cli.ranges import FloatFrom0, IntFrom0, IntFrom1

if TYPE_CHECKING:
    from draftsmith.infer.contract.protocols import Drafter
    from draftsmith.infer.costs.pass_costs import Costs


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
    machine: str = "",
    target_config: str = "",
    dtype: str = "auto",
    batch_sizes: Sequence[IntFrom1] = (1, 4, 8, 16, 32),
    template: str = "auto",
    temperature: FloatFrom0 = 0.0,
    nodes: IntFrom1 = 64,
    depth: IntFrom1 = 64,
    rule: RuleName = DEFAULT,
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
        machine: model pass costs instead: h100, a100, l40s, rtx4090, cpu (this one) or FILE.yaml; needs target_config.
            A draft model's seconds are scaled to that machine; other proposals take as long as here.
        target_config: config.json of the target, or its folder or Hub name; no weights are read.
        dtype: type of the target's weights for machine; auto takes the config's.
        batch_sizes: batch sizes of those predictions.
        template: how conversations were rendered: auto (chat, or plain without one), chat (the tokenizer's own), plain,
            a format with {prompt}, or a FastChat name.
        temperature: the temperature of the answers; above 0 drawn chains are forecast, from answers with
            log-probabilities, and other drafts of a draft model need [sample=likeliest], also in a mix.
        nodes: maximum nodes of a draft.
        depth: maximum depth of a draft.
        rule: how drafts are verified: token, block (chains of drawn tokens as a whole), or traversal (trees as well).
        limit: read at most this many records.
        on_bad: rows that cannot be read: raise an error, or skip and count them.
        seed: random seed of the intervals.
        json: print one JSON object on the last line.
    """
    from rich.text import Text

    from draftsmith.infer.contract.protocols import Budget
    from draftsmith.infer.costs.pass_costs import Costs
    from draftsmith.infer.files.locations import check_writable
    from draftsmith.infer.measure import tables
    from draftsmith.infer.measure.forecast.tables import forecast_tables
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
    asked, loaded = parse_split(split) if split else None, load_tokenizer(tokenizer)
    costs, draft_ratio = Costs.load(latency) if latency else None, None
    if machine or target_config:
        costs, draft_ratio = _modelled(machine, target_config, dtype, latency)
    if costs is not None:
        check_tokenizer(costs, loaded, latency or target_config)
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
            rule=rule,
            seed=seed,
            arrival=arrival,
            costs=costs,
            batch_sizes=batch_sizes,
            draft_ratio=draft_ratio,
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
    if results["drafters"]:
        tables.show(tables.replay_tables(results))
    if results["forecast"]:
        tables.show([Text(), *forecast_tables(results["forecast"])])


def _modelled(machine: str, config: str, dtype: str, latency: str) -> tuple[Costs, Callable[[Drafter], float]]:
    """The target's costs on `machine`, and how its speed scales a draft model's passes."""
    from functools import partial

    from draftsmith.infer.measure.plan.modelled import draft_ratio, machine_for, modelled_costs
    from draftsmith.infer.measure.plan.shapes import choose_dtype, load_config

    if latency:
        raise ValueError("--latency holds measured costs and --machine models them: give one of the two")
    if not (machine and config):
        raise ValueError("--machine and --target_config belong together: the machine, and the target's config.json")
    loaded = load_config(config)
    kind = choose_dtype(loaded, dtype)
    found = machine_for(machine, loaded, kind)
    return modelled_costs(loaded, kind, found, name=config), partial(draft_ratio, dtype=kind, machine=found)


def _path(store_out: str, stack: ExitStack) -> Path:
    """Folder for the store of the split: the one asked for, or a temporary one that `stack` removes."""
    if store_out:
        return Path(store_out).expanduser()
    return Path(stack.enter_context(TemporaryDirectory())) / "store"
