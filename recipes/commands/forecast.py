"""`draftsmith forecast`: the accepted_length of a draft's drawn chains, of every length, without decoding."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from json import dumps
from typing import Literal

from draftsmith.recipes.cli.ranges import Above0To1, FloatAbove0, IntFrom0, IntFrom1


def forecast(
    *,
    data: list[str],
    drafters: str,
    target: str | None = None,
    tokenizer: str | None = None,
    temperature: FloatAbove0 | None = None,
    top_k: IntFrom0 | None = None,
    top_p: Above0To1 | None = None,
    logprobs_mode: Literal["", "processed", "raw"] = "",
    rule: Literal["token", "block", "both"] = "both",
    lengths: Sequence[IntFrom1] = (1, 2, 3, 4, 6, 8, 12),
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
    json: bool = False,
) -> None:
    """Forecast how many tokens a step commits, for every length of a drawn chain, without decoding.

    Exact for texts that the target drew at a temperature above 0: it needs the log-probability that the target gave
    each token, after temperature and truncation, and makes one pass of the draft over the texts.

    Example: draftsmith forecast --data answers.jsonl --drafters small:DRAFT --latency costs.json

    Args:
        data: answers that the target drew, with log-probabilities (`draftsmith answers --logprobs`, or a server's log).
        drafters: comma-separated draft models, such as small:MODEL,sd2:SORTED; a sorted draft is forecast at each exit.
        target: folder or Hub name of the target, to compute log-probabilities that the logs lack or that are raw.
        tokenizer: folder or Hub name of the target's tokenizer; by default the target's, or the first draft's.
        temperature: at which the answers were drawn, if the logs do not say it.
        top_k: the answers were drawn from this many of the likeliest tokens, if the logs do not say it.
        top_p: the answers were drawn from the likeliest tokens that make up this probability, if the logs do not say
            it.
        logprobs_mode: what the logs' log-probabilities are, if they do not say it: processed (after temperature and
            truncation) or raw, which will do at temperature 1 without truncation.
        rule: verification rule: token, block, or both.
        lengths: of the drawn chains.
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
        json: print one JSON object on the last line.
    """
    from draftsmith.infer.contract.sampling import resolve_settings
    from draftsmith.infer.costs.pass_costs import Costs
    from draftsmith.infer.measure.forecast.drafts import bind_draft, check_draws
    from draftsmith.infer.measure.forecast.forecast import RULES, Forecast
    from draftsmith.infer.measure.forecast.tables import forecast_tables
    from draftsmith.infer.measure.forecast.texts import check_drawn, logged_settings, logged_texts, scored_texts
    from draftsmith.infer.measure.predicted import check_tokenizer
    from draftsmith.infer.measure.recordings import recordings, with_questions
    from draftsmith.infer.measure.tables import show
    from draftsmith.infer.models.load import check_model, load_target
    from draftsmith.infer.text.records import ReadReport, read_records
    from draftsmith.infer.text.templates import find_template, load_tokenizer
    from draftsmith.recipes.cli.inputs import parse_drafters
    from draftsmith.recipes.cli.progress import progress

    if not drafters:
        raise ValueError("give --drafters, such as small:DRAFT")
    if target is not None:
        check_model(target, dtype, device)
    costs = Costs.load(latency) if latency else None
    chosen = {label: check_draws(label, drafter) for label, drafter in parse_drafters(drafters).items()}
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
    check_drawn(settings)
    if loaded is None:
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
    )
    results = run.results(chosen, lambda done, total, name: progress(f"{name}: {done}/{total}", last=done == total))
    results |= {"logprobs": "logged" if loaded is None else "computed", "template": form.name}
    if json:
        if report.used < report.rows:
            print(*report.lines(), sep="\n", file=sys.stderr)
        print(dumps(results, ensure_ascii=False))
        return
    print(*report.lines(), sep="\n")
    show(forecast_tables(results))
