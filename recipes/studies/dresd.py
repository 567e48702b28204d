"""Retrieval drafters against plain decoding, as `draftsmith bench`, with the time to propose: what retrieval costs.

python -m draftsmith.recipes.studies.dresd --target MODEL --data Q.jsonl --drafters dresd:STORE,rest:OTHER,pld
"""

from __future__ import annotations

from json import dumps
from typing import Any

from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.measure import tables
from draftsmith.infer.measure.bench import bench
from draftsmith.infer.measure.figures import summarise
from draftsmith.infer.measure.metrics import propose_figures
from draftsmith.infer.measure.runners import LoopRunner, Question, coders
from draftsmith.infer.models.load import load_target
from draftsmith.infer.text.records import read_records
from draftsmith.infer.text.templates import find_template
from draftsmith.recipes.cli.inputs import PLAIN, parse_drafters
from draftsmith.recipes.cli.progress import progress
from draftsmith.recipes.studies import run_study


def dresd(
    *,
    target: str,
    data: list[str],
    drafters: str,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: int = 1,
    limit: int | None = None,
    min_distinct: float = 0.5,
    template: str = "chat",
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    json: bool = False,
) -> None:
    """Compare retrieval drafters with plain decoding and with one another, in one process, question by question.

    Args:
        target: folder or Hub name of the model.
        data: the questions.
        drafters: comma-separated, such as dresd:STORE,rest:STORE,pld.
        max_new_tokens: of each answer.
        temperature: 0 is greedy.
        top_p: sample from the most probable tokens that reach this probability.
        batch_size: questions answered together.
        limit: the most questions to ask.
        min_distinct: leave out questions whose plain answer has a smaller share of distinct 4-grams.
        template: how the target is served.
        dtype: of the target's weights.
        device: where the target runs.
        seed: of sampling, of the order of runs and of the intervals.
        json: print one JSON object on the last line.
    """
    loaded = load_target(target, dtype=dtype, device=device)
    form, settings = find_template(template, loaded.tokenizer), Settings(temperature, top_p=top_p, seed=seed)
    stops = loaded.stops(max_new_tokens)
    named: dict[str, Any] = {PLAIN: None} | parse_drafters(drafters)
    measured = bench(
        [LoopRunner(name, loaded, each, settings, stops) for name, each in named.items()],
        [Question.of(record) for record in read_records(data, limit=limit, need="questions")],
        *coders(form),
        batch_size=batch_size,
        seed=seed,
        progress=lambda now: progress(now.line(), last=now.done),
    )
    results = summarise(measured, min_distinct=min_distinct)
    for name in named:
        answers = measured.outcomes[name].values()
        traces = [trace for outcomes in answers for outcome in outcomes for trace in outcome.traces]
        results["drafters"][name] |= propose_figures(traces)
    if json:
        print(dumps(results, ensure_ascii=False))
        return
    tables.show(tables.bench_tables(results))
    for name in named:
        figures = results["drafters"][name]
        print(f"{name}: propose {figures['propose_ms_p50']:.2f} ms (median), {figures['propose_ms_p99']:.2f} ms (p99)")


if __name__ == "__main__":
    run_study(dresd)
