"""Whether a mix is worth more than its drafters: `python -m draftsmith.recipes.studies.mixed --target T --draft D`.

Every drafter runs at every number of nodes, the mix too, interleaved in one process by `draftsmith bench`'s loop. The
mix is compared with the best single drafter of the same number of nodes, by accepted_length and by tokens/s, with
paired intervals over the questions; and beside a source that never says anything, with the draft model alone. A
question whose plain answer repeats itself is left out: it flatters what looks text up.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from json import dumps
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from draftsmith.infer.contract.sampling import resolve_settings
from draftsmith.infer.files.atomic import write_json
from draftsmith.infer.files.provenance import hardware
from draftsmith.infer.measure.bench import Measured, bench
from draftsmith.infer.measure.bootstrap import Interval, speedup_interval
from draftsmith.infer.measure.figures import summarise
from draftsmith.infer.measure.runners import LoopRunner, Question, coders
from draftsmith.infer.measure.tables import number, show, table_of, with_interval
from draftsmith.infer.models.load import load_target
from draftsmith.infer.text.templates import find_template
from draftsmith.recipes.cli.inputs import PLAIN, parse_drafters, read_questions
from draftsmith.recipes.cli.progress import progress
from draftsmith.recipes.studies import run_study

MIX, SILENT = "mix", "silent"
# What is wanted of the mix over the best single drafter, and of the draft model beside a silent source.
LONGER, FASTER, LEAST_SILENT = 1.15, 1.1, 0.98


def mixed(
    *,
    target: str,
    draft: str,
    data: list[str],
    others: str = "pld",
    nodes: list[int] | None = None,
    max_new_tokens: int = 64,
    limit: int | None = None,
    repeats: int = 1,
    min_distinct: float = 0.5,
    temperature: float = 0.0,
    clock: Literal["wall", "cpu"] = "wall",
    template: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    out: str | None = None,
    json: bool = False,
) -> int:
    """Compare the mix with its drafters; 1 if it falls short of what is wanted.

    Args:
        target: folder or Hub name of the target model.
        draft: a small LM with the target's tokenizer.
        data: the questions.
        others: the other drafters of the mix, with a plus between them.
        nodes: the numbers of nodes to compare at; by default 8 and 16.
        max_new_tokens: of each answer.
        limit: the most questions to ask.
        repeats: how often to answer each question.
        min_distinct: leave out questions whose plain answer has a smaller share of distinct 4-grams.
        temperature: of the target.
        clock: what speeds are taken from: wall, or on a busy machine this process's cpu time.
        template: how the target is served.
        dtype: of the target's weights and the draft's.
        device: where the target runs.
        seed: of sampling, of the order of runs and of the intervals.
        out: a JSON file for the results.
        json: print one JSON object instead of the table.
    """
    sizes = nodes or [8, 16]
    loaded = load_target(target, dtype=dtype, device=device)
    form = find_template(template, loaded.tokenizer)
    settings = resolve_settings(loaded.generation_config, temperature=temperature, seed=seed)
    stops = loaded.stops(max_new_tokens)
    own = "" if dtype == "auto" else f",dtype={dtype}"
    drafters = parse_drafters(",".join(specs(draft, others, sizes, own)))
    measured = bench(
        [LoopRunner(name, loaded, one, settings, stops) for name, one in ({PLAIN: None} | drafters).items()],
        [Question.of(record) for record in read_questions(data, limit)],
        *coders(form),
        seed=seed,
        repeats=repeats,
        progress=lambda now: progress(now.line(), last=now.done),
        clock=time.perf_counter if clock == "wall" else time.process_time,
    )
    found = summarise(measured, min_distinct=min_distinct)
    compared = comparisons(measured, found, sizes)
    results = {
        "machine": hardware(), "clock": clock, "temperature": temperature, "left_out": found["left_out"]["questions"],
        "drafters": {name: _figures(one) for name, one in found["drafters"].items()}, "compared": compared,
    }  # fmt: skip
    if out:
        write_json(Path(out), results)
    if json:
        print(dumps(results, ensure_ascii=False))
    else:
        show([table(results), table_of_comparisons(compared)])
    short = shortfalls(compared)
    print("; ".join(short) or "the mix is worth what is wanted of it")
    return int(bool(short))


def specs(draft: str, others: str, sizes: Sequence[int], own: str = "") -> list[str]:
    """What `--drafters` takes: each drafter and the mix at every size, and the draft model beside a silent source."""
    found = []
    parts = others.split("+")
    for size in sizes:
        small = f"small:{draft}[nodes={size},min_confidence=0,top_k=4{own}]"
        found += [f"{part.partition(':')[0]}-{size}={part}[nodes={size}]" for part in parts]
        found.append(f"small-{size}={small}")
        found.append(f"{MIX}-{size}=({'+'.join(f'{part}[nodes={size}]' for part in parts)}+{small})[nodes={size}]")
    found.append(f"{SILENT}-{sizes[-1]}=empty+small:{draft}[nodes={sizes[-1]},min_confidence=0,top_k=4{own}]")
    return found


def comparisons(measured: Measured, found: Mapping[str, Any], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """The mix with the best single drafter at each size, and the draft model with and without a silent source."""
    left_out = set(found["left_out"]["ids"])
    ids = [one.id for one in measured.questions if one.id not in left_out]
    compared = []
    for size in sizes:
        singles = [name for name in found["drafters"] if name.endswith(f"-{size}") and name.split("-")[0] not in
                   (MIX, SILENT)]  # fmt: skip
        best = max(singles, key=lambda name: found["drafters"][name]["accepted_length"] or 0.0)
        compared.append(compare_pair(measured, ids, f"{MIX}-{size}", best))
    compared.append(compare_pair(measured, ids, f"{SILENT}-{sizes[-1]}", f"small-{sizes[-1]}"))
    return compared


def compare_pair(measured: Measured, ids: Sequence[int | str], name: str, base: str) -> dict[str, Any]:
    """Ratios of accepted_length and of tokens/s in decoding, with intervals over the questions."""
    columns: dict[str, list[list[float]]] = {}
    for runner in (name, base):
        tokens: list[float] = []
        steps: list[float] = []
        seconds: list[float] = []
        for one in ids:
            turns = [turn for outcome in measured.outcomes[runner][one] for turn in outcome.turns]
            traces = [trace for turn in turns for trace in turn.generation.traces]
            tokens.append(sum(trace.committed for trace in traces))
            steps.append(len(traces))
            seconds.append(sum(turn.wall_s for turn in turns))
        columns[runner] = [tokens, steps, seconds]
    own, other = columns[name], columns[base]
    made = {"name": name, "base": base, "questions": len(ids)}
    for what, at in (("longer", 1), ("faster", 2)):
        ratio = (sum(own[0]) / sum(own[at])) / (sum(other[0]) / sum(other[at]))
        between: Interval = speedup_interval(own[0], own[at], other[0], other[at], seed=measured.seed)
        made |= {what: ratio, f"{what}_interval": between}
    return made


def _figures(found: Mapping[str, Any]) -> dict[str, Any]:
    wanted = ("accepted_length", "nodes_per_step", "end_to_end_speedup", "equal", "total", "errors", "by_source")
    return {key: found[key] for key in wanted if key in found}


def shortfalls(compared: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was wanted and not reached, in words."""
    best = max((one for one in compared if one["name"].startswith(MIX)), key=lambda one: one["longer"])
    (silent,) = (one for one in compared if one["name"].startswith(SILENT))
    found = []
    for one, what, least in ((best, "longer", LONGER), (best, "faster", FASTER), (silent, "faster", LEAST_SILENT)):
        if one[what] < least:
            found.append(f"{one['name']} is {one[what]:.2f} times as {what.removesuffix('er')} as {one['base']}, "
                         f"and {least} is wanted")  # fmt: skip
    return found


def table(results: Mapping[str, Any]) -> Table:
    """A row per drafter."""
    rows = table_of(["drafter", "accepted_length", "nodes", "end to end", "equal"], left=1)
    for name, one in results["drafters"].items():
        rows.add_row(
            name,
            number(one["accepted_length"]),
            number(one["nodes_per_step"]),
            number(one["end_to_end_speedup"]),
            f"{one['equal']}/{one['total']}",
        )
    return rows


def ratios(one: Mapping[str, Any]) -> tuple[str, str]:
    """Those of accepted_length and of speed, with intervals."""
    return with_interval(one["longer"], one["longer_interval"]), with_interval(one["faster"], one["faster_interval"])


def table_of_comparisons(compared: Sequence[Mapping[str, Any]]) -> Table:
    """A row per comparison, with intervals."""
    rows = table_of(["compared", "with", "accepted_length", "speed"], left=2)
    for one in compared:
        rows.add_row(one["name"], one["base"], *ratios(one))
    return rows


if __name__ == "__main__":
    raise SystemExit(run_study(mixed))
