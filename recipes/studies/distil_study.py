"""What distillation is worth: arms of training at equal cost, and what each draft commits under each way of drafting.

    OUT/calibration.json      CPU seconds of a step of every arm, measured once, taking turns: steps = budget / seconds
    OUT/runs/ARM-SEED/        a training run as any other
    OUT/measured/ARM-SEED.json   per way of drafting, what every prompt committed in how many steps
    OUT/plain.json            how much of the target's own greedy answers repeats itself

What is finished is not done again. CPU seconds, because they hold on a machine that others use too. An arm may begin
from another arm's draft of the same seed. What the figures come to is not known here (distil_figures.py).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.drafters.small_lm import SmallLM
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.files.atomic import write_json
from draftsmith.infer.measure.metrics import Totals
from draftsmith.infer.models.load import load_model, load_target
from draftsmith.infer.text.templates import find_template
from draftsmith.recipes.studies.study_runs import finished, first_turns, measured_path, plain_answers
from draftsmith.train.data.batches import MicroBatches
from draftsmith.train.drafts.context import TrainContext
from draftsmith.train.drafts.exits import ExitStates
from draftsmith.train.drafts.init import init_draft
from draftsmith.train.objectives.distil import Distil
from draftsmith.train.objectives.objective import Objective
from draftsmith.train.objectives.sft import SFT
from draftsmith.train.run.config import TrainConfig, resolved
from draftsmith.train.run.optimisers import make_optimiser
from draftsmith.train.run.run import load_data, train_draft
from draftsmith.train.run.validation import ROWS_AT_ONCE


@dataclass(frozen=True, slots=True)
class Arm:
    """One kind of run.

    Args:
        name: of the arm.
        distil: Distil's arguments; None: supervised fine-tuning.
        seconds: its budget, in CPU seconds of training steps.
        steps_of: take this arm's steps instead, for what is to be compared at equal steps.
        cost_of: the arm whose steps cost as much as this one's, which is not measured itself.
        begins_as: the arm whose draft it goes on from; not given: `init`.
        ways: the ways of drafting that it is measured by.
    """

    name: str
    distil: Mapping[str, Any] | None
    seconds: float
    steps_of: str = ""
    cost_of: str = ""
    begins_as: str = ""
    init: str = "first"
    num_layers: int = 2
    shape: Mapping[str, int] | None = None
    lr: float = 1e-3
    ways: Sequence[str] = ("greedy", "sampled", "tree")

    def objective(self) -> Objective:
        return SFT() if self.distil is None else Distil(**self.distil)


@dataclass(frozen=True, slots=True)
class Way:
    """A way of drafting: SmallLM's arguments, and the target's temperature."""

    drafter: Mapping[str, Any]
    temperature: float = 0.0


WAYS = {
    "greedy": Way({"top_k": 1, "num_draft_tokens": 4, "min_confidence": 0.0}),
    "sampled": Way({"top_k": 1, "num_draft_tokens": 4, "min_confidence": 0.0, "sample": True}, temperature=1.0),
    "tree": Way({"top_k": 4, "num_draft_tokens": 4, "nodes": 16, "width": 2, "min_confidence": 0.0}),
}


@dataclass(frozen=True, slots=True)
class Study:
    """All arms share `plan` but for what an arm names."""

    plan: TrainConfig
    arms: Sequence[Arm]
    questions: list[str]
    max_new_tokens: int = 48
    seeds: Sequence[int] = field(default=(0, 1, 2))

    @property
    def out(self) -> Path:
        return Path(self.plan.out)

    def planned(self, arm: Arm, seed: int, steps: int) -> TrainConfig:
        before = str(self.run(arm.begins_as, seed)) if arm.begins_as else arm.init
        return replace(
            self.plan, out=str(self.run(arm.name, seed)), seed=seed, max_steps=steps, init=before,
            num_layers=arm.num_layers, shape=None if arm.shape is None else dict(arm.shape),
            optim=replace(self.plan.optim, lr=arm.lr),
        )  # fmt: skip

    def run(self, name: str, seed: int) -> Path:
        return self.out / "runs" / f"{name}-{seed}"

    def measured(self, name: str, seed: int) -> Path:
        return measured_path(self.out, name, seed)


def run_study(study: Study) -> None:
    """Everything that is not there yet, all arms of a seed before the next seed begins."""
    steps = calibrated(study)
    if not (study.out / "plain.json").is_file():
        target = load_target(study.plan.target, device="cpu")
        write_json(study.out / "plain.json", plain_answers(target, _prompts(study, target), study.max_new_tokens))
    for seed in study.seeds:
        for arm in study.arms:
            folder = study.run(arm.name, seed)
            if not finished(folder):
                _tell(f"training {arm.name}, seed {seed}, {steps[arm.name]} steps")
                train_draft(arm.objective(), study.planned(arm, seed, steps[arm.name]))
            if not study.measured(arm.name, seed).is_file():
                _tell(f"measuring {arm.name}, seed {seed}")
                write_json(study.measured(arm.name, seed), measure(study, arm, folder))


def calibrated(study: Study, rounds: int = 3) -> dict[str, int]:
    """Steps of every arm, from one measurement in which they took turns."""
    path = study.out / "calibration.json"
    if not path.is_file():
        steps = {arm.name: _Steps(study, arm) for arm in study.arms if not arm.cost_of}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(rounds + 1):
            for name, one in steps.items():
                took = one.seconds()
                if turn:
                    seconds[name].append(took)
        write_json(path, {name: statistics.median(found) for name, found in seconds.items()})
    each = json.loads(path.read_text(encoding="utf-8"))
    own = {arm.name: max(round(arm.seconds / each[arm.cost_of or arm.name]), 1) for arm in study.arms}
    return {arm.name: own[arm.steps_of or arm.name] for arm in study.arms}


class _Steps:
    """An arm's optimiser steps, without what a run does around them."""

    def __init__(self, study: Study, arm: Arm) -> None:
        plan = resolved(replace(study.planned(arm, 0, 1), init=arm.init))
        loaded, tokenizer = load_model(plan.target, device="cpu")
        corpus, data = load_data(plan, find_template(plan.text.template, tokenizer), first=False)
        model = init_draft(loaded, num_layers=plan.num_layers, how=plan.init, shape=plan.shape).train()
        self.objective = arm.objective()
        self.objective.begin(TrainContext(loaded, model, corpus, plan.text.max_length, "cpu"))
        self.draft = ExitStates(model, self.objective.exits(plan.num_layers))
        named = list(self.draft.named_parameters())
        self.optimiser = make_optimiser(named, plan.optim.name, 1e-5, 0.0, (0.9, 0.95), frozenset())
        rows = plan.optim.batch_size
        self.batches = MicroBatches(corpus, data.stream, rows, plan.optim.micro_batch_size, 0, 1)
        self.number = 0

    def seconds(self) -> float:
        """CPU seconds of one step."""
        began = time.process_time()
        for _ in range(self.batches.per_step):
            batch = self.batches[self.number]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                sums = self.objective(self.draft, batch)
            (sums.total / batch["loss_tokens"]).backward()
            self.number += 1
        self.optimiser.step()
        self.optimiser.zero_grad()
        return time.process_time() - began


def measure(study: Study, arm: Arm, folder: Path) -> dict[str, Any]:
    """Per way of drafting: what every prompt committed, and in how many steps."""
    target = load_target(study.plan.target, device="cpu")
    prompts = _prompts(study, target)
    model, _ = load_model(str(folder), dtype=str(target.model.dtype).removeprefix("torch."), device="cpu")
    found: dict[str, Any] = {"loss": _held_out(folder)}
    for name in arm.ways:
        way = WAYS[name]
        drafter = SmallLM(model, **way.drafter)
        drafter.bind(target)
        settings, stops = Settings(temperature=way.temperature), Stops(study.max_new_tokens, target.eos_ids)
        rows = [Row(f"held-out-{i}", prompt, settings, stops) for i, prompt in enumerate(prompts)]
        totals = [Totals.of(done.traces) for done in generate(target, drafter, rows, batch_size=ROWS_AT_ONCE)]
        found[name] = {"committed": [row.committed for row in totals], "steps": [row.steps for row in totals]}
    return found


def _prompts(study: Study, target: Any) -> list[list[int]]:
    return first_turns(study.questions, find_template(study.plan.text.template, target.tokenizer))


def _held_out(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8")).get("results", {})
    return results


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
