"""Whether a drafter is ever slower than plain decoding: `python -m draftsmith.recipes.studies.never_slower --target T`.

The grid: every drafter, and an adversary whose every token is wrong and sure, at several batch sizes and temperatures.
Each cell starts with nothing learned and is a run of its own of `draftsmith bench`'s loop: all drafters interleaved
with plain decoding in one process. A speedup is a ratio of end-to-end tokens/s; the paired bootstrap of its interval
draws batches, not questions as `bench` does: the rows of a batch share its seconds, and so the machine's noise. What
`draftsmith calibrate` has not measured yet is measured first; the adversary gets the costs of prompt lookup and no
calibration.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping, Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from draftsmith.infer.contract.protocols import couples
from draftsmith.infer.contract.sampling import resolve_settings
from draftsmith.infer.costs.calibration import band_of, costs_path, find_calibration, find_costs
from draftsmith.infer.files.atomic import write_json
from draftsmith.infer.files.provenance import hardware
from draftsmith.infer.measure.bench import BenchProgress, Measured, bench
from draftsmith.infer.measure.bootstrap import MIN_PAIRS, Interval, speedup_interval
from draftsmith.infer.measure.calibrate.fit import home
from draftsmith.infer.measure.figures import summarise
from draftsmith.infer.measure.runners import LoopRunner, Question, coders
from draftsmith.infer.measure.tables import number, percent, show, table_of, with_interval
from draftsmith.infer.models.load import load_target
from draftsmith.infer.text.templates import find_template
from draftsmith.recipes.cli.inputs import PLAIN, parse_drafters, read_questions
from draftsmith.recipes.cli.progress import progress
from draftsmith.recipes.commands.calibrate import calibrate
from draftsmith.recipes.studies import run_study

if TYPE_CHECKING:
    from draftsmith.infer.models.hf_target import HFTarget

ADVERSARY, LOOKUP = "adversary", "pld"
# A cell loses if the lower end of its speedup's interval is below this.
LEAST = 0.97
FIGURES = (
    "speedup", "end_to_end_speedup", "accepted_length", "hit_rate", "nodes_per_step", "step_s", "time_shares", "equal",
    "total", "errors", "pairs",
)  # fmt: skip


def never_slower(
    *,
    target: str,
    data: list[str],
    draft: str = "",
    sorted: str = "",
    store: str = "",
    dresd: str = "",
    eagle: str = "",
    medusa: str = "",
    hydra: str = "",
    drafters: list[str] | None = None,
    batch_sizes: list[int] | None = None,
    temperatures: list[float] | None = None,
    calibrate_on: list[str] | None = None,
    seconds: float = 60.0,
    max_new_tokens: int = 64,
    limit: int | None = None,
    visits: int = 8,
    min_distinct: float = 0.5,
    clock: Literal["wall", "cpu"] = "wall",
    template: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    out: str | None = None,
    json: bool = False,
) -> int:
    """Measure every cell of the grid; the last line names those that lose. 1 if there are any.

    Args:
        target: folder or Hub name of the target model.
        data: the questions.
        draft: a small LM with the target's tokenizer.
        sorted: a sorted draft, for sd2.
        store: a store of documents, for rest.
        dresd: a store of the target's states.
        eagle: an EAGLE head of the target.
        medusa: Medusa heads of it.
        hydra: Hydra heads of it.
        drafters: measure only these of pld, small, sd2, rest, dresd, eagle, medusa, hydra and adversary; by default all
            that are given.
        batch_sizes: by default 1, 2, 4, 8 and 16.
        temperatures: by default 0 and 0.8.
        calibrate_on: other prompts, to calibrate with what was not calibrated before; by default the questions, which
            favours the drafters.
        seconds: time limit for timing passes, if costs are missing.
        max_new_tokens: of each answer.
        limit: the most questions to ask.
        visits: the least number of batches to time in each cell; a large batch repeats its questions.
        min_distinct: leave out questions whose plain answer has a smaller share of distinct 4-grams.
        clock: what end-to-end speedups are taken from: wall, or on a busy machine this process's cpu time.
        template: how the target is served.
        dtype: of the target's weights, and unless it is auto of the drafts'.
        device: where the target runs.
        seed: of sampling, of the order of runs and of the intervals.
        out: a JSON file for the results, written after each batch size.
        json: print one JSON object before the last line instead of the table.
    """
    models = {"small": draft, "sd2": sorted, "eagle": eagle, "medusa": medusa, "hydra": hydra}
    stores = {"rest": store, "dresd": dresd}
    specs = _specs(models, stores, drafters, "" if dtype == "auto" else f"[dtype={dtype}]")
    heats = [0.0, 0.8] if temperatures is None else temperatures
    loaded = load_target(target, dtype=dtype, device=device)
    if missing := uncalibrated(specs, loaded, heats):
        calibrate(
            target=target, drafters=",".join(missing), data=calibrate_on or data, temperatures=heats, seconds=seconds,
            template=template, dtype=dtype, device=device, seed=seed,
        )  # fmt: skip
    questions = [Question.of(record) for record in read_questions(data, limit)]
    form = find_template(template, loaded.tokenizer)
    stops, measured_with = loaded.stops(max_new_tokens), time.perf_counter if clock == "wall" else time.process_time
    results: dict[str, Any] = {"machine": hardware(), "dtype": str(loaded.model.dtype), "clock": clock, "least": LEAST}
    results |= {"cells": [], "left_out": {}}
    for heat in heats:
        settings = resolve_settings(loaded.generation_config, temperature=heat, seed=seed)
        for batch_size in batch_sizes or [1, 2, 4, 8, 16]:
            runners = _bound(specs, loaded)
            measured = bench(
                [LoopRunner(name, loaded, drafter, settings, stops) for name, drafter in runners.items()],
                questions,
                *coders(form),
                batch_size=batch_size,
                seed=seed,
                repeats=-(-visits // -(-len(questions) // batch_size)),
                progress=_progress(heat, batch_size),
                clock=measured_with,
            )
            found = summarise(measured, min_distinct=min_distinct)
            results["left_out"][f"{heat:g}"] = found["left_out"]["questions"]
            results["cells"] += cells(measured, found, heat)
            if out:
                write_json(Path(out), results)
    if json:
        print(dumps(results, ensure_ascii=False))
    else:
        show([table(results["cells"])])
    losing = below(results["cells"])
    print(f"lower end under {LEAST}: {'; '.join(map(_named, losing)) or 'no cell'}")
    return int(bool(losing))


def _specs(
    models: Mapping[str, str], stores: Mapping[str, str], only: Sequence[str] | None, options: str = ""
) -> dict[str, str]:
    """Name -> what `--drafters` takes, of those with what they need; `options` of the draft models."""
    specs = {LOOKUP: LOOKUP}
    specs |= {name: f"{name}:{path}{options}" for name, path in models.items() if path}
    specs |= {name: f"{name}:{path}" for name, path in stores.items() if path}
    specs[ADVERSARY] = ADVERSARY
    for name in only or ():
        if name not in specs:
            raise ValueError(f"cannot measure {name!r}: there are {', '.join(specs)}; give its model or store")
    return {name: spec for name, spec in specs.items() if only is None or name in only}


def uncalibrated(specs: Mapping[str, str], target: HFTarget, temperatures: Sequence[float]) -> list[str]:
    """The drafters for which costs, or the calibration of a temperature, are missing; the adversary needs lookup's
    costs."""
    wanted = dict.fromkeys(LOOKUP if name == ADVERSARY else spec for name, spec in specs.items())
    drafters = {spec: drafter for spec in wanted for drafter in parse_drafters(spec).values()}
    missing = []
    for spec, drafter in drafters.items():
        known = find_calibration(home(drafter), target)
        bands = {band_of(one, couples(drafter)) for one in temperatures}
        if find_costs(home(drafter), target) is None or known is None or not bands <= set(known.bands):
            missing.append(spec)
    return missing


def _bound(specs: Mapping[str, str], target: HFTarget) -> dict[str, Any]:
    """Plain decoding and fresh drafters by name."""
    drafters = parse_drafters(",".join(specs.values()))
    if ADVERSARY in drafters:
        drafters[ADVERSARY].costs = str(costs_path(LOOKUP, target))
        drafters[ADVERSARY].calibration = "none"
    return {PLAIN: None} | drafters


def _progress(temperature: float, batch_size: int) -> Callable[[BenchProgress], None]:
    return lambda now: progress(f"T={temperature:g}, batch {batch_size}: {now.line()}", last=now.done)


def cells(measured: Measured, found: Mapping[str, Any], temperature: float) -> list[dict[str, Any]]:
    """A cell per drafter of a run, with the figures of `summarise`."""
    return [
        {"drafter": name, "temperature": temperature, "batch_size": measured.batch_size}
        | {key: figures[key] for key in FIGURES}
        | {"interval": by_visits(measured, name, set(found["left_out"]["ids"]))}
        for name, figures in found["drafters"].items()
        if name != measured.baseline
    ]


def by_visits(measured: Measured, name: str, left_out: Container[int | str]) -> Interval:
    """The interval of a drafter's end-to-end speedup, drawn from the batches that were timed; None for too few."""
    size, ids = measured.batch_size, [question.id for question in measured.questions]
    columns: list[list[float]] = [[], [], [], []]
    for group in (ids[at : at + size] for at in range(0, len(ids), size)):
        pairs = [
            one
            for one in group
            if one not in left_out and not measured.error(name, one) and not measured.error(measured.baseline, one)
        ]
        for repeat in range(measured.repeats if pairs else 0):
            for side, runner in enumerate((name, measured.baseline)):
                turns = [turn for one in pairs for turn in measured.outcomes[runner][one][repeat].turns]
                columns[2 * side].append(sum(len(turn.generation.token_ids) for turn in turns))
                columns[2 * side + 1].append(sum(turn.wall_s for turn in turns))
    return speedup_interval(*columns, seed=measured.seed)


def below(found: Sequence[Mapping[str, Any]], least: float = LEAST) -> list[Mapping[str, Any]]:
    """The cells that cannot be said to keep up: the lower end is below `least`, there is none, or something failed."""
    ends = [(cell, cell["interval"]) for cell in found]
    return [cell for cell, between in ends if cell["errors"] or between is None or between[0] < least]


def _named(cell: Mapping[str, Any]) -> str:
    between = cell["interval"]
    figure = f"{between[0]:.2f}" if between else f"no interval (fewer than {MIN_PAIRS} batches)"
    failed = f", {cell['errors']} failed" if cell["errors"] else ""
    return f"{cell['drafter']} T={cell['temperature']:g} batch {cell['batch_size']}: {figure}{failed}"


def table(found: Sequence[Mapping[str, Any]]) -> Table:
    """A row per cell."""
    columns = ["drafter", "T", "batch", "speedup", "in decoding", "accepted_length", "nodes", "overhead", "equal"]
    rows = table_of(columns, left=1)
    for cell in found:
        rows.add_row(
            cell["drafter"],
            f"{cell['temperature']:g}",
            str(cell["batch_size"]),
            with_interval(cell["end_to_end_speedup"], cell["interval"]),
            number(cell["speedup"]),
            number(cell["accepted_length"]),
            number(cell["nodes_per_step"]),
            percent(cell["time_shares"]["overhead"]),
            f"{cell['equal']}/{cell['total']}",
        )
    return rows


if __name__ == "__main__":
    raise SystemExit(run_study(never_slower))
