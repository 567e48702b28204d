"""Rules and kinds of drafts in sampled text: `python -m draftsmith.recipes.studies.sampling_rules --target T ...`.

Chains and trees of equally many nodes, drawn, coupled or of likeliest tokens, under the rules that tell them apart, all
interleaved with plain decoding by `draftsmith bench`'s loop. Each is compared with a drawn chain that is verified token
by token: accepted_length and tokens per CPU second, with paired intervals over the questions.
"""

from __future__ import annotations

import time
from json import dumps
from pathlib import Path
from typing import Any

from rich.table import Table

from draftsmith.infer.contract.sampling import resolve_settings
from draftsmith.infer.files.atomic import write_json
from draftsmith.infer.files.provenance import hardware
from draftsmith.infer.measure.bench import bench
from draftsmith.infer.measure.figures import summarise
from draftsmith.infer.measure.runners import LoopRunner, Question, coders
from draftsmith.infer.measure.tables import number, show, table_of, with_interval
from draftsmith.infer.models.load import load_target
from draftsmith.infer.text.templates import find_template
from draftsmith.recipes.cli.inputs import PLAIN, parse_drafters, read_questions
from draftsmith.recipes.cli.progress import progress
from draftsmith.recipes.studies import run_study
from draftsmith.recipes.studies.mixed import compare_pair, ratios

BASE = "drawn-token"
CHAIN, TREE = "top_k=1,num_draft_tokens={nodes}", "nodes={nodes},num_draft_tokens={depth}"
# Name -> rule, and options of the draft.
VARIANTS = {
    BASE: ("token", f"sample=drawn,{CHAIN}"),
    "drawn-block": ("block", f"sample=drawn,{CHAIN}"),
    "drawn-tree-token": ("token", f"sample=drawn,top_k=2,{TREE}"),
    "drawn-tree-traversal": ("traversal", f"sample=drawn,top_k=2,{TREE}"),
    "coupled-chain": ("block", f"sample=coupled,{CHAIN}"),
    "coupled-tree": ("block", f"sample=coupled,top_k=2,{TREE}"),
    "likeliest-tree": ("block", f"sample=likeliest,top_k=4,{TREE}"),
}


def sampling_rules(
    *,
    target: str,
    draft: str,
    data: list[str],
    nodes: int = 4,
    depth: int = 4,
    temperature: float = 0.8,
    costs: str = "none",
    max_new_tokens: int = 48,
    limit: int | None = None,
    min_distinct: float = 0.5,
    dtype: str = "auto",
    seed: int = 0,
    out: str | None = None,
    json: bool = False,
) -> None:
    """Compare every rule and kind of draft.

    Args:
        target: folder or Hub name of the target model.
        draft: a small LM with the target's tokenizer.
        data: the questions.
        nodes: of every draft.
        depth: of the trees.
        temperature: of the target.
        costs: measured pass costs, which cut drafts to what pays: a file, auto, or none.
        max_new_tokens: of each answer.
        limit: the most questions to ask.
        min_distinct: leave out questions whose plain answer has a smaller share of distinct 4-grams.
        dtype: of the target's weights.
        seed: of sampling, of the order of runs and of the intervals.
        out: a JSON file for the results.
        json: print one JSON object instead of the table.
    """
    loaded = load_target(target, dtype=dtype)
    form = find_template("auto", loaded.tokenizer)
    settings = resolve_settings(loaded.generation_config, temperature=temperature, seed=seed)
    stops, runners = loaded.stops(max_new_tokens), []
    for name, (rule, options) in {PLAIN: ("token", ""), **VARIANTS}.items():
        given = f"{options.format(nodes=nodes, depth=depth)},min_confidence=0,costs={costs},calibration=none"
        drafter = parse_drafters(f"small:{draft}[{given}]")["small"] if options else None
        runners.append(LoopRunner(name, loaded, drafter, settings, stops, rule=rule))
    measured = bench(
        runners,
        [Question.of(record) for record in read_questions(data, limit)],
        *coders(form),
        seed=seed,
        progress=lambda now: progress(now.line(), last=now.done),
        clock=time.process_time,
    )
    found = summarise(measured, min_distinct=min_distinct)
    kept = [one.id for one in measured.questions if one.id not in set(found["left_out"]["ids"])]
    rows = table_of(["draft, rule", "nodes", "accepted_length", f"over {BASE}", "CPU speed", f"over {BASE}"])
    results = {"machine": hardware(), "temperature": temperature, "nodes": nodes, "left_out": found["left_out"]}
    for name in VARIANTS:
        one, against = found["drafters"][name], compare_pair(measured, kept, name, BASE)
        results[name] = against | {key: one[key] for key in ("accepted_length", "nodes_per_step", "errors")}
        results[name] |= {"speedup": one["end_to_end_speedup"], "interval": one["end_to_end_speedup_interval"]}
        _add(rows, name, results[name])
    if out:
        write_json(Path(out), results)
    if json:
        print(dumps(results))
    else:
        show([rows])


def _add(rows: Table, name: str, one: dict[str, Any]) -> None:
    longer, faster = ratios(one)
    cells = (number(one["nodes_per_step"], 1), number(one["accepted_length"]), longer)
    rows.add_row(name, *cells, with_interval(one["speedup"], one["interval"]), faster)


if __name__ == "__main__":
    raise SystemExit(run_study(sampling_rules))
