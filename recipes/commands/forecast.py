"""`draftsmith forecast`: the accepted_length of a draft's chains and trees, without decoding."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Literal

from draftsmith.recipes.cli.ranges import Above0To1, FloatFrom0, IntFrom0, IntFrom1


def forecast(
    *,
    data: list[str],
    drafters: str,
    target: str | None = None,
    tokenizer: str | None = None,
    temperature: FloatFrom0 | None = None,
    top_k: IntFrom0 | None = None,
    top_p: Above0To1 | None = None,
    logprobs_mode: Literal["", "processed", "raw"] = "",
    rule: Literal["token", "block", "both"] = "both",
    lengths: Sequence[IntFrom1] = (1, 2, 3, 4, 6, 8, 12),
    trees: str = "",
    max_new_tokens: IntFrom1 | None = None,
    latency: str = "",
    batch_sizes: Sequence[IntFrom1] = (1, 4, 8, 16, 32),
    questions: str = "",
    template: str = "auto",
    batch_size: IntFrom1 = 8,
    limit: IntFrom1 | None = None,
    on_bad: Literal["raise", "skip"] = "raise",
    dtype: str = "auto",
    device: str = "auto",
    seed: IntFrom0 = 0,
    out: str | None = None,
    json: bool = False,
) -> None:
    """Forecast how many tokens a step commits, for every length of a chain and for trees, without decoding.

    Exact for texts that the target wrote. Above temperature 0 chains are drawn, which needs the log-probability that
    the target gave each token, after temperature and truncation; at 0 they are the draft's likeliest tokens. The draft
    makes one pass over the texts.

    Example: draftsmith forecast --data answers.jsonl --drafters small:DRAFT --latency costs.json

    Args:
        data: answers of the target, with log-probabilities if they were drawn at a temperature (`draftsmith answers
            --logprobs`, or a server's log).
        drafters: comma-separated draft models and heads, such as small:MODEL,eagle:HEAD; a sorted draft is forecast at
            each exit, and heads need --target.
        target: folder or Hub name of the target, to compute log-probabilities that the logs lack or that are raw.
        tokenizer: folder or Hub name of the target's tokenizer; by default the target's, or the first draft's.
        temperature: at which the answers were drawn, if the logs do not say it; 0 is greedy.
        top_k: the answers were drawn from this many of the likeliest tokens, if the logs do not say it.
        top_p: the answers were drawn from the likeliest tokens that make up this probability, if the logs do not say
            it.
        logprobs_mode: what the logs' log-probabilities are, if they do not say it: processed (after temperature and
            truncation) or raw, which will do at temperature 1 without truncation.
        rule: verification rule: token, block, or both.
        lengths: of the chains.
        trees: trees of the draft's likeliest tokens: the children of each node by depth, such as 4-2-1, or NODESxDEPTH,
            such as 14x4, for trees that grow best first; these are replayed, which takes longer.
        max_new_tokens: token limit that answers are decoded with; drafts are cut to fit it.
        latency: file of pass costs (`draftsmith calibrate`), to predict speedups.
        batch_sizes: batch sizes of those predictions.
        questions: the questions of answer files; by default questions.jsonl or question.jsonl beside them or one
            folder up.
        template: how conversations were rendered: auto (chat, or plain without one), chat (the tokenizer's own), plain,
            a format with {prompt}, or a FastChat name.
        batch_size: answers that the target reads together.
        limit: read at most this many records.
        on_bad: rows that cannot be read: raise an error, or skip and count them.
        dtype: type of the target's weights, such as bfloat16.
        device: device of the target, such as cuda or cpu.
        seed: random seed of the intervals.
        out: file to write the figures to, for `plan --forecast` and `report --forecast`.
        json: print one JSON object on the last line.
    """
    from draftsmith.infer.contract.sampling import resolve_settings
    from draftsmith.infer.costs.pass_costs import Costs
    from draftsmith.infer.files.atomic import write_json
    from draftsmith.infer.files.locations import check_writable
    from draftsmith.infer.measure.forecast.drafting import Drafting
    from draftsmith.infer.measure.forecast.drafts import bind_draft, check_draws, check_target
    from draftsmith.infer.measure.forecast.forecast import RULES, Forecast
    from draftsmith.infer.measure.forecast.tables import forecast_tables
    from draftsmith.infer.measure.forecast.texts import greedy_texts, logged_settings, logged_texts, scored_texts
    from draftsmith.infer.measure.predicted import check_tokenizer
    from draftsmith.infer.measure.recordings import recordings, with_questions
    from draftsmith.infer.measure.tables import show
    from draftsmith.infer.models.load import check_model, load_target
    from draftsmith.infer.text.records import ReadReport, read_records
    from draftsmith.infer.text.templates import find_template, load_tokenizer
    from draftsmith.infer.text.tokenizer import tokenizer_fingerprint
    from draftsmith.recipes.cli.inputs import parse_drafters
    from draftsmith.recipes.cli.progress import progress

    if not drafters:
        raise ValueError("give --drafters, such as small:DRAFT")
    if out:
        check_writable(out)
    wanted = [Drafting.parse_tree(word.strip()) for word in trees.split(",") if word.strip()]
    if target is not None:
        check_model(target, dtype, device)
    costs = Costs.load(latency) if latency else None
    chosen = {label: check_draws(label, drafter) for label, drafter in parse_drafters(drafters).items()}
    for label, drafter in chosen.items() if target is None else ():
        check_target(label, drafter)
    loaded = None if target is None else load_target(target, dtype=dtype, device=device)
    own = next(iter(chosen.values())).reader.tokenizer if loaded is None else loaded.tokenizer
    known = own if tokenizer is None else load_tokenizer(tokenizer)
    if known is None:
        raise ValueError("neither the target nor the first draft has a tokenizer: give --tokenizer")
    if costs is not None:
        check_tokenizer(costs, known, latency)
    form = find_template(template, known)
    report = ReadReport()
    records = read_records(data, limit=limit, need="answers", on_bad=on_bad, report=report)
    streams = recordings(with_questions(records, questions, report), form)
    for drafter in chosen.values():
        bind_draft(drafter, loaded, known)
    asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    settings = resolve_settings(None, **logged_settings(streams, {k: v for k, v in asked.items() if v is not None}))
    if settings.greedy:
        texts = greedy_texts(streams)
    elif loaded is None:
        texts = logged_texts(streams, settings, logprobs_mode)
    else:
        texts = scored_texts(loaded, streams, settings, batch_size)
    run = Forecast(
        texts,
        settings,
        sorted(set(lengths)),
        RULES if rule == "both" else (rule,),
        max_new_tokens,
        seed=seed,
        costs=costs,
        batch_sizes=batch_sizes,
        trees=wanted,
    )
    results = run.results(chosen, lambda done, total, name: progress(f"{name}: {done}/{total}", last=done == total))
    source = "none" if settings.greedy else "logged" if loaded is None else "computed"
    results |= {"logprobs": source, "template": form.name, "tokenizer": tokenizer_fingerprint(known)}
    if out:
        write_json(Path(out), results)
    if json:
        if report.used < report.rows:
            print(*report.lines(), sep="\n", file=sys.stderr)
        print(dumps(results, ensure_ascii=False))
        return
    print(*report.lines(), sep="\n")
    show(forecast_tables(results))
