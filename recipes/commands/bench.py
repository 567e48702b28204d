"""`draftsmith bench`: drafters against plain decoding, with one target, on the same questions in one process; or
servers under load."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from json import dumps
from typing import TYPE_CHECKING, Any

from draftsmith.infer.rules.named import DEFAULT, RuleName
from draftsmith.recipes.cli.ranges import Above0To1, FloatAbove0, FloatFrom0, From0To1, IntFrom0, IntFrom1

if TYPE_CHECKING:
    from draftsmith.infer.measure.runners import Decode, Encode, Question, Runner
    from draftsmith.infer.measure.ties import TieJudge


def bench(
    *,
    data: list[str],
    target: str | None = None,
    drafters: str = "",
    max_new_tokens: IntFrom1 = 128,
    temperature: FloatFrom0 = 0.0,
    top_k: IntFrom0 | None = None,
    top_p: Above0To1 | None = None,
    min_p: From0To1 | None = None,
    repetition_penalty: FloatAbove0 | None = None,
    batch_size: IntFrom1 = 1,
    rule: RuleName = DEFAULT,
    dtype: str = "auto",
    device: str = "auto",
    tp: IntFrom1 = 1,
    seed: IntFrom0 = 0,
    out: str | None = None,
    json: bool = False,
    limit: IntFrom1 | None = None,
    peers: str = "",
    min_distinct: From0To1 = 0.0,
    repeats: IntFrom1 = 1,
    warmup: IntFrom0 = 1,
    template: str = "auto",
    server: str | None = None,
    plain_server: str | None = None,
    model: str = "",
    api_key_file: str = "",
    concurrency: Sequence[IntFrom1] = (1, 4, 16),
) -> int:
    """Measure drafters against plain decoding: speed, acceptance, and whether the answers are equal.

    With --server instead of --target: a running server's tokens/s, time to first token (TTFT) and per token (TPOT), at
    several numbers of concurrent requests, and the acceptance that its /metrics show (Draftsmith, vLLM, SGLang).

    Example: draftsmith bench --target MODEL --data questions.jsonl --drafters pld,small:DRAFT --out runs/first

    Args:
        data: questions: files, folders or `datasets` names.
        target: folder or Hub name of the target model.
        drafters: comma-separated, such as pld,rest:STORE,small:MODEL,sd2:MODEL,more.yaml; a plus makes one of several,
            as mix=pld+small:MODEL. `rest` without a store drafts from each answer's own text only: nothing is learned
            from one question for the next.
        max_new_tokens: token limit of each answer (one per turn).
        temperature: 0 is greedy.
        top_k: sample from this many of the likeliest tokens; 0 from all.
        top_p: sample from the likeliest tokens, up to this total probability.
        min_p: sample from tokens with at least this share of the likeliest one's probability.
        repetition_penalty: above 1 makes tokens that are already in the text less likely.
        batch_size: questions answered together.
        rule: how drafts are verified: token, block (chains of drawn tokens as a whole), or traversal (trees as well).
        dtype: type of the target's weights, such as bfloat16.
        device: device of the target, such as cuda or cpu.
        tp: ranks that the target's weights are split over, with a device each; they are started for you. Drafts stay
            whole unless they ask for the same: small:DRAFT[tp=2].
        seed: random seed of sampling, of the order of runs and of the intervals.
        out: a new folder for answers, traces, results and report.html; the same command resumes a run that was stopped,
            but not one of a server.
        json: print one JSON object on the last line instead of tables.
        limit: read at most this many questions.
        peers: other decoders to measure as well: generate, prompt_lookup, assistant:MODEL.
        min_distinct: leave answers that loop out of the figures: those with a smaller share of distinct 4-grams.
        repeats: how many times to measure each question.
        warmup: batches that each runner answers first, without measuring them; of a server, as many rounds of
            concurrent requests.
        template: prompt template: auto (chat, or plain without one), chat (the tokenizer's own), plain, a format with
            {prompt}, or a FastChat name.
        server: URL of an OpenAI-compatible server to measure, instead of a target.
        plain_server: URL of one that serves the same model without drafts, asked in turn with it: for the speedup.
        model: name of the model on the server; by default the first that it lists.
        api_key_file: file with the servers' API key; by default it is read from OPENAI_API_KEY.
        concurrency: numbers of concurrent requests, such as 1,4,16.
    """
    config = dict(locals())
    from draftsmith.recipes.commands.serving.bench_server import SERVER_ONLY, bench_server, check_options

    check_options(bench, config)
    if server is not None:
        return bench_server(config, lambda: _questions(data, limit))
    assert target is not None
    for name in SERVER_ONLY:  # they say nothing about a target's run
        del config[name]
    from draftsmith.infer.costs.identity import TargetIdentity
    from draftsmith.infer.drafters.registry import short_names
    from draftsmith.infer.files.provenance import provenance
    from draftsmith.infer.measure import tables
    from draftsmith.infer.measure.bench import bench as measure
    from draftsmith.infer.measure.bench import read_bandwidth
    from draftsmith.infer.measure.figures import summarise
    from draftsmith.infer.measure.peers import parse_peers
    from draftsmith.infer.measure.report.view import verdict_of
    from draftsmith.infer.measure.run_folder import RunFolder, UnfinishedRun
    from draftsmith.infer.measure.runners import LoopRunner
    from draftsmith.infer.measure.ties import name_ties
    from draftsmith.infer.models.load import check_model
    from draftsmith.recipes.cli.progress import progress
    from draftsmith.recipes.commands.report import report_beside

    check_model(target, dtype, device, tp)
    if parse_peers(peers) and tp > 1:
        raise ValueError("--peers decode with a target on one device: leave them out, or --tp")
    folder = RunFolder.create(out, resumable=True) if out else None
    questions = _questions(data, limit)
    runners, encode, decode, judge, weights = _runners(config)
    assert isinstance(runners[0], LoopRunner), "plain decoding comes first"
    identity = TargetIdentity.of(target, runners[0].target).to_json()
    facts = provenance(sys.argv, config, seed)
    facts |= {"sampling": judge.settings.to_json(), "target": identity, "weights": weights}
    # Only now, so that refused input leaves no folder that blocks the next run.
    run = UnfinishedRun.begin(folder, facts, questions) if folder else None
    try:
        measured = measure(
            runners, questions, encode, decode, batch_size=batch_size, seed=seed, warmup=warmup, repeats=repeats,
            progress=lambda now: progress(now.line(), last=now.done), done=run.visits if run else (),
            on_visit=run.add if run else None,
        )  # fmt: skip
    except KeyboardInterrupt as stop:
        advice = "run the same command again to resume" if run else "with --out a run can be resumed"
        raise KeyboardInterrupt(advice) from stop
    results = summarise(measured, min_distinct=min_distinct, bandwidth=read_bandwidth(judge.model.device))
    if folder:
        folder.write_measured(measured, results)
    if temperature == 0:
        name_ties(results, measured, encode, judge, runners, lambda done, all: progress(
            f"{done}/{all} differences judged", last=done == all))  # fmt: skip
    if folder and run:
        folder.write_results(results)
        report_beside(folder.path)
        run.finish()
    if json:
        print(dumps(results, ensure_ascii=False))
    else:
        verdict = verdict_of(facts, results, short_names())
        tables.show(tables.bench_tables(results, [verdict.sentence, *verdict.notes]))
    if failed := measured.all_failed():
        print(f"draftsmith bench: every run failed: {failed}", file=sys.stderr)
    return int(bool(failed))


def _questions(data: list[str], limit: int | None) -> list[Question]:
    from draftsmith.infer.measure.runners import Question
    from draftsmith.recipes.cli.inputs import read_questions

    return [Question.of(record) for record in read_questions(data, limit)]


def _runners(config: dict[str, Any]) -> tuple[list[Runner], Encode, Decode, TieJudge, str]:
    """Plain decoding, every drafter and every peer; encode, decode, the judge of ties, and the target's fingerprint."""
    from draftsmith.infer.contract.protocols import LearnsAnswers
    from draftsmith.infer.contract.sampling import resolve_settings
    from draftsmith.infer.measure.peers import load_peers
    from draftsmith.infer.measure.runners import LoopRunner, coders
    from draftsmith.infer.measure.ties import TieJudge
    from draftsmith.infer.models.load import load_target
    from draftsmith.infer.rules.named import as_rule
    from draftsmith.infer.text.templates import find_template
    from draftsmith.recipes.cli.inputs import PLAIN, parse_drafters

    # Drafters first: a mistake in their names or arguments is found before the target's weights are read.
    drafters = {PLAIN: None} | parse_drafters(config["drafters"])
    target = load_target(config["target"], dtype=config["dtype"], device=config["device"], tp=config["tp"])
    template = find_template(config["template"], target.tokenizer)
    config["template"] = template.name
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    settings = resolve_settings(target.generation_config, **{name: config[name] for name in names})
    stops = target.stops(config["max_new_tokens"])
    rule = as_rule(config["rule"])
    runners: list[Runner] = [
        LoopRunner(name, target, drafter, settings, stops, rule=rule) for name, drafter in drafters.items()
    ]
    learning = [name for name, one in drafters.items() if isinstance(one, LearnsAnswers) and one.learns]
    if learning:
        print(
            f"{', '.join(learning)}: answers are not learned here, so that each question is asked as if it were the "
            "first; `draftsmith replay --arrival` measures what learning adds",
            file=sys.stderr,
        )
    runners += load_peers(config["peers"], config["target"], config["dtype"], config["device"], settings, stops)

    judge = TieJudge(target.model, settings, sorted(target.eos_ids))
    return runners, *coders(template), judge, target.fingerprint()
