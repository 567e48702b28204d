"""Studies of training: train several drafts per seed, decode held-out prompts with each, compare their accepted_length.

    OUT/run.json                 how the study was started
    OUT/runs/NAME-SEED/          a training run like any other
    OUT/measured/NAME-SEED.json  per way of decoding: committed tokens and steps of every prompt
    OUT/calibration.json         CPU seconds per step of every run, of studies at equal cost
    OUT/plain.json               how repetitive the target's own greedy answers are

Finished runs and measurements are not repeated. Seeds are pooled prompt by prompt: committed tokens and steps are
summed over the seeds, and the bootstrap draws prompts, the same ones for both sides of a ratio. So an interval covers
other prompts, not other seeds; each seed's own figure stands beside it. Fewer than eight prompts give no interval. A
prompt whose plain answer repeats itself flatters every draft, so all figures are given with and without such prompts.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.drafters.small_lm import SmallLM
from draftsmith.infer.files.atomic import write_json
from draftsmith.infer.measure.bootstrap import MIN_PAIRS, ratio_interval, speedup_interval
from draftsmith.infer.measure.metrics import Totals, distinct_share, ratio
from draftsmith.infer.models.layers import first_layers
from draftsmith.infer.models.load import load_model, load_target
from draftsmith.infer.text.records import read_records
from draftsmith.infer.text.templates import Template, find_template
from draftsmith.train.data.batches import IGNORED, MicroBatches
from draftsmith.train.drafts.exits import ExitStates, TrainContext
from draftsmith.train.drafts.trainable import BuildContext
from draftsmith.train.objectives.objective import Objective
from draftsmith.train.objectives.soft import SoFT
from draftsmith.train.run.config import RunConfig, TrainConfig, resolved
from draftsmith.train.run.data_module import load_data
from draftsmith.train.run.optimisers import make_optimiser
from draftsmith.train.run.run import train_draft
from draftsmith.train.run.validation import decode

if TYPE_CHECKING:
    from draftsmith.infer.models.hf_target import HFTarget

ROWS_AT_ONCE = 24
MIN_DISTINCT = 0.5
# (run, seed) -> way -> {"committed": per prompt, "steps": per prompt, "loss": where the way is an exit}. Beside the
# ways stands "loss", the results of the training run itself.
Measured = dict[tuple[str, int], dict[str, dict[str, Any]]]
# (run, the run it is divided by, way)
Pair = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Run:
    """A draft that is trained, once per seed.

    Args:
        name: name of the run.
        objective: makes its objective.
        ways: names of the study's ways that it is measured by.
        options: fields of TrainConfig in which it differs from the study's.
        starts_from: the run whose draft of the same seed it continues to train; default: `options["init"]`.
    """

    name: str
    objective: Callable[[], Objective]
    ways: Sequence[str]
    options: Mapping[str, Any]
    starts_from: str = ""


@dataclass(frozen=True, slots=True)
class Way:
    """A way of decoding: SmallLM's arguments, the target's temperature, and the exit (default: the whole draft)."""

    drafter: Mapping[str, Any]
    temperature: float = 0.0
    exit: int | None = None


@dataclass(frozen=True, slots=True)
class Study:
    """All runs share `config`, except for their own options. `questions` are the held-out prompts."""

    config: TrainConfig
    runs: Sequence[Run]
    ways: Mapping[str, Way]
    pairs: Sequence[Pair]
    questions: list[str]
    max_new_tokens: int = 48
    seeds: Sequence[int] = field(default=(0, 1, 2))

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    def folder(self, name: str, seed: int) -> Path:
        return self.out / "runs" / f"{name}-{seed}"

    def measured(self, name: str, seed: int) -> Path:
        return self.out / "measured" / f"{name}-{seed}.json"

    def config_of(self, run: Run, seed: int) -> TrainConfig:
        options = dict(run.options)
        if run.starts_from:
            options["init"] = str(self.folder(run.starts_from, seed))
        return replace(self.config, out=str(self.folder(run.name, seed)), seed=seed, **options)

    def finish(self) -> dict[str, Any]:
        """Train and measure what is missing, all runs of a seed before the next seed; the study's results."""
        if not (self.out / "plain.json").is_file():
            target, template = self._target()
            answers = decode(target, Empty(), self._prompts(template), self.max_new_tokens, rows_at_once=ROWS_AT_ONCE)
            distinct = [distinct_share([answer.token_ids]) for answer in answers]
            write_json(self.out / "plain.json", {"distinct": distinct})
        for seed in self.seeds:
            for run in self.runs:
                config = self.config_of(run, seed)
                if run_json(Path(config.out)).get("state") != "finished":
                    print(f"training {run.name}, seed {seed}", file=sys.stderr, flush=True)
                    train_draft(run.objective(), config)
                measured = self.measured(run.name, seed)
                if not measured.is_file():
                    print(f"measuring {run.name}, seed {seed}", file=sys.stderr, flush=True)
                    write_json(measured, self._measure(run, config))
        return summarise(*read_measured(self.out), self.pairs)

    def _measure(self, run: Run, config: TrainConfig) -> dict[str, Any]:
        target, template = self._target()
        exits = {name: exit for name in run.ways if (exit := self.ways[name].exit) is not None}
        losses = dict(zip(exits, _exit_losses(config, template, list(exits.values()))))
        # Loaded afresh, as it is served: in the target's precision, without the hooks that read the exits.
        model, _ = load_model(config.out, dtype=str(target.model.dtype).removeprefix("torch."), device="cpu")
        found: dict[str, Any] = {"loss": run_json(Path(config.out)).get("results", {})}
        for name in run.ways:
            way = self.ways[name]
            drafter = SmallLM(model if way.exit is None else first_layers(model, way.exit), **way.drafter)
            answers = decode(
                target, drafter, self._prompts(template), self.max_new_tokens, way.temperature, ROWS_AT_ONCE
            )
            rows = [Totals.of(answer.traces) for answer in answers]
            found[name] = {"committed": [row.committed for row in rows], "steps": [row.steps for row in rows]}
            if name in losses:
                found[name]["loss"] = losses[name]
        return found

    def _target(self) -> tuple[HFTarget, Template]:
        target, text = load_target(self.config.target, device="cpu"), self.config.text
        assert target.tokenizer is not None
        return target, find_template(text.template, target.tokenizer, text.template_kwargs, text.system)

    def _prompts(self, template: Template) -> list[list[int]]:
        """The first turn of every question, rendered."""
        return [template.prompt_ids(record.prompt) for record in read_records(self.questions, need="questions")]


class TimedSteps:
    """The optimiser steps of a training run alone, without what it does between them."""

    def __init__(self, config: RunConfig, objective: Any, builder: Any) -> None:
        config = resolved(config)
        loaded, tokenizer = load_model(config.target, device="cpu")
        corpus, data = load_data(config, find_template(config.text.template, tokenizer), first=False)
        special = tuple(tokenizer.all_special_ids)
        self.draft = builder.build(BuildContext(loaded, corpus, torch.float32, special_ids=special))
        self.objective = objective
        self.objective.begin(TrainContext(loaded, self.draft.model, corpus, config.text.max_length, "cpu"))
        named = list(self.draft.named_parameters())
        self.optimiser = make_optimiser(named, config.optim.name, 1e-6, 0.0, (0.9, 0.95), frozenset())
        self.batches = MicroBatches(corpus, data.stream, config.optim.batch_size, config.optim.micro_batch_size, 0, 1)
        self.mixed = config.machine.precision == "bf16-mixed"
        self.number = 0

    def seconds(self) -> float:
        """CPU seconds of one step."""
        began = time.process_time()
        for _ in range(self.batches.per_step):
            batch = self.batches[self.number]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.mixed):
                sums = self.objective(self.draft, batch)
            (sums.total / batch["loss_tokens"]).backward()
            self.number += 1
        self.optimiser.step()
        self.optimiser.zero_grad()
        return time.process_time() - began


def step_seconds(out: Path, runs: Mapping[str, Callable[[], TimedSteps]], rounds: int = 3) -> dict[str, float]:
    """CPU seconds per step of each run, measured in turns unless the study's calibration.json has them."""
    path = out / "calibration.json"
    if not path.is_file():
        timed = {name: make().seconds for name, make in runs.items()}
        write_json(path, {name: statistics.median(found) for name, found in in_turns(timed, rounds).items()})
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return found


def in_turns(timed: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The seconds of each, `rounds` times in turns; one more turn warms up."""
    turns = [{name: seconds() for name, seconds in timed.items()} for _ in range(rounds + 1)]
    return {name: [turn[name] for turn in turns[1:]] for name in timed}


def run_json(folder: Path) -> dict[str, Any]:
    """A training run's record; empty if there is none."""
    path = folder / "run.json"
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return facts


def _exit_losses(config: TrainConfig, template: Template, exits: Sequence[int]) -> list[float]:
    """The mean held-out loss at each exit of the finished draft in `config.out`."""
    if not exits:
        return []
    model, _ = load_model(config.out, device="cpu")
    _, data = load_data(resolved(config), template, first=False)
    draft, objective = ExitStates(model, exits), SoFT(exits)
    sums, count = torch.zeros(len(exits)), 0
    with torch.no_grad():
        for batch in data.val_batches():
            sums += objective(draft, batch).per_exit_E
            count += int((batch["labels"] != IGNORED).sum())
    return [float(value) for value in sums / max(count, 1)]


def read_measured(out: Path) -> tuple[Measured, list[float]]:
    """What has been measured so far in a study's folder, and the distinct share of each plain answer."""
    found: Measured = {}
    for path in sorted((out / "measured").glob("*.json")):
        name, _, seed = path.stem.rpartition("-")
        found[name, int(seed)] = json.loads(path.read_text(encoding="utf-8"))
    plain = out / "plain.json"
    return found, json.loads(plain.read_text(encoding="utf-8"))["distinct"] if plain.is_file() else []


def summarise(found: Measured, distinct: Sequence[float], pairs: Sequence[Pair]) -> dict[str, Any]:
    """Every run's accepted_length by way, and of each pair the first over the second, for the seeds that both have."""
    every = list(range(len(distinct)))
    sides = {"all": every, "not_looping": [i for i in every if distinct[i] >= MIN_DISTINCT]}
    runs: dict[str, Any] = {}
    for name in dict.fromkeys(name for name, _ in found):
        ways = [way for (other, _), measured in found.items() if other == name for way in measured if way != "loss"]
        runs[name] = {way: _alone(found, name, way, sides) for way in dict.fromkeys(ways)}
    return {
        "prompts": {side: len(picked) for side, picked in sides.items()},
        "runs": runs,
        "ratios": [_compared(found, pair, sides) for pair in pairs if _seeds(found, *pair)],
    }


def _seeds(found: Measured, name: str, other: str, way: str) -> list[int]:
    """Seeds for which both runs were measured this way."""
    return sorted(
        seed for run, seed in found if run == name and all(way in found.get((r, seed), ()) for r in (run, other))
    )


def _alone(found: Measured, name: str, way: str, sides: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """accepted_length of a run, and its held-out loss where the way is an exit."""
    seeds = _seeds(found, name, name, way)
    figures: dict[str, Any] = {"seeds": seeds}
    losses = [found[name, seed][way]["loss"] for seed in seeds if "loss" in found[name, seed][way]]
    if losses:
        figures |= {"loss": statistics.fmean(losses), "loss_by_seed": losses}
    for side, picked in sides.items():
        columns = _columns(found, name, way, seeds, picked)
        figures[side] = {
            "accepted_length": _length(columns),
            "interval": ratio_interval(*columns, seed=0),
            "by_seed": [_length(_columns(found, name, way, [seed], picked)) for seed in seeds],
        }
    return figures


def _compared(found: Measured, pair: Pair, sides: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """accepted_length of one run over another's."""
    one, other, way = pair
    seeds = _seeds(found, *pair)
    figures: dict[str, Any] = {"run": one, "over": other, "way": way, "seeds": seeds}
    for side, picked in sides.items():
        mine, theirs = (_columns(found, name, way, seeds, picked) for name in (one, other))
        each = [[_columns(found, name, way, [seed], picked) for name in (one, other)] for seed in seeds]
        figures[side] = {
            "ratio": _ratio(mine, theirs),
            "interval": speedup_interval(*mine, *theirs, seed=0),
            "by_seed": [_ratio(*columns) for columns in each],
        }
    return figures


def _columns(found: Measured, name: str, way: str, seeds: Sequence[int], picked: Sequence[int]) -> list[list[float]]:
    """[committed, steps] per prompt, summed over `seeds`."""
    runs = [found[name, seed][way] for seed in seeds]
    return [[sum(run[what][i] for run in runs) for i in picked] for what in ("committed", "steps")]


def _length(columns: Sequence[Sequence[float]]) -> float | None:
    return ratio(sum(columns[0]), sum(columns[1]))


def _ratio(mine: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float | None:
    above, below = _length(mine), _length(theirs)
    return None if above is None or below is None else ratio(above, below)


def markdown(results: dict[str, Any]) -> str:
    """Both tables, in Markdown that also reads well in a terminal."""
    count = results["prompts"]
    columns = [
        f"{count['all']} prompts",
        "by seed",
        f"{count['not_looping']} whose plain answer does not loop",
        "by seed",
    ]
    lines = [f"| run | way | held-out loss | accepted_length, {' | '.join(columns)} |", "| --- " * 7 + "|"]
    for name, ways in results["runs"].items():
        for way, row in ways.items():
            loss = f"{row['loss']:.3f}" if "loss" in row else "-"
            lines.append(f"| {name} | {way} | {loss} | {_cells(row, 'accepted_length', 2)} |")
    lines += ["", f"| ratio of accepted_lengths | way | {' | '.join(columns)} |", "| --- " * 6 + "|"]
    for row in results["ratios"]:
        lines.append(f"| {row['run']} / {row['over']} | {row['way']} | {_cells(row, 'ratio', 3)} |")
    few = [count for count in results["prompts"].values() if count < MIN_PAIRS]
    if few:
        lines += ["", f"no interval: fewer than {MIN_PAIRS} prompts"]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any], what: str, digits: int) -> str:
    """For both sides: the figure with its interval, and each seed's own."""
    cells = []
    for side in (row["all"], row["not_looping"]):
        interval = side["interval"]
        between = ", ".join(f"{end:.{digits}f}" for end in interval) if interval else "no interval"
        cells.append("-" if side[what] is None else f"{side[what]:.{digits}f} [{between}]")
        cells.append(", ".join("-" if value is None else f"{value:.{digits}f}" for value in side["by_seed"]))
    return " | ".join(cells)
