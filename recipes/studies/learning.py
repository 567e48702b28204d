"""Does sorted training pay? One draft with exits beside drafts trained for one depth each, at equal steps and data.

Three kinds of runs, per seed: `soft` (all exits at once), `sft` (the whole draft; its shallow exits come untrained),
and `sft-K` (a draft of K layers by itself, for each shallow exit). Other weights of the exits are further runs, named
by them. Each finished draft answers the same held-out prompts through infer's own step, from each of its exits.

    OUT/run.json            how the study was started
    OUT/runs/NAME-SEED/     a training run as any other
    OUT/measured/NAME-SEED.json   what its draft is worth, prompt by prompt
    OUT/plain.json          the target's own greedy answers, for what loops

What is finished is not done again. What the figures come to is not known here (learning_figures.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.infer.drafters.small_lm import SmallLM
from draftsmith.infer.files.atomic import write_json
from draftsmith.infer.measure.metrics import Totals
from draftsmith.infer.models.layers import first_layers
from draftsmith.infer.models.load import load_model, load_target
from draftsmith.infer.text.templates import Template, find_template
from draftsmith.recipes.studies.study_runs import finished, first_turns, measured_path, plain_answers
from draftsmith.train.drafts.exits import ExitStates, check_exits
from draftsmith.train.objectives.objective import Objective
from draftsmith.train.objectives.sft import SFT
from draftsmith.train.objectives.soft import SoFT
from draftsmith.train.run.config import TrainConfig, resolved
from draftsmith.train.run.run import load_data, train_draft
from draftsmith.train.run.validation import decode_greedily, exit_losses

if TYPE_CHECKING:
    from draftsmith.infer.models.hf_target import HFTarget


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of training run. `exits` are those that its draft is measured at."""

    name: str
    num_layers: int
    exits: tuple[int, ...]
    objective: Callable[[], Objective]


@dataclass(frozen=True, slots=True)
class Decoding:
    """How held-out prompts are answered."""

    max_new_tokens: int = 48
    num_draft_tokens: int = 4
    rows_at_once: int = 24


def all_kinds(num_layers: int, exits: Sequence[int], weights: Iterable[Sequence[float]] = ()) -> list[Kind]:
    """soft, sft, sft-K for every shallow exit, and soft with each of the other `weights` of its exits."""
    known = check_exits(exits, num_layers)
    kinds = [Kind("soft", num_layers, known, lambda: SoFT(known)), Kind("sft", num_layers, known, SFT)]
    kinds += [Kind(f"sft-{exit}", exit, (exit,), SFT) for exit in known[:-1]]
    for given in weights:
        SoFT(known, given)
        name = "soft-" + "-".join(f"{weight:g}" for weight in given)
        kinds.append(Kind(name, num_layers, known, lambda given=given: SoFT(known, given)))  # type: ignore[misc]
    return kinds


def run_study(
    plan: TrainConfig, kinds: Sequence[Kind], seeds: Sequence[int], questions: list[str], decoding: Decoding
) -> None:
    """Train and measure every kind with every seed into `plan.out`, but for what is there already."""
    out = Path(plan.out)
    for seed in seeds:
        for kind in kinds:
            own = replace(plan, out=str(out / "runs" / f"{kind.name}-{seed}"), seed=seed, num_layers=kind.num_layers)
            if not finished(Path(own.out)):
                print(f"training {kind.name}, seed {seed}", file=sys.stderr, flush=True)
                train_draft(kind.objective(), own)
            measured = measured_path(out, kind.name, seed)
            if not measured.is_file():
                print(f"measuring {kind.name}, seed {seed}", file=sys.stderr, flush=True)
                write_json(measured, measure(own, kind, questions, decoding))
    if not (out / "plain.json").is_file():
        target, template = _target(plan)
        prompts = first_turns(questions, template)
        write_json(out / "plain.json", plain_answers(target, prompts, decoding.max_new_tokens, decoding.rows_at_once))


def measure(plan: TrainConfig, kind: Kind, questions: list[str], decoding: Decoding) -> dict[str, Any]:
    """Of the draft in `plan.out`, per exit: its held-out loss, and what each prompt committed in how many steps."""
    target, template = _target(plan)
    model, _ = load_model(plan.out, device="cpu")
    _, data = load_data(resolved(plan), template, first=False)
    losses = exit_losses(ExitStates(model, kind.exits), data.val_batches())
    # A fresh copy, as it is served: in the target's precision, without the hooks that read the exits.
    model, _ = load_model(plan.out, dtype=str(target.model.dtype).removeprefix("torch."), device="cpu")
    prompts = first_turns(questions, template)
    found: dict[str, Any] = {}
    for exit, loss in zip(kind.exits, losses):
        drafter = SmallLM(first_layers(model, exit), num_draft_tokens=decoding.num_draft_tokens)
        answers = decode_greedily(target, drafter, prompts, decoding.max_new_tokens, decoding.rows_at_once)
        rows = [Totals.of(answer.traces) for answer in answers]
        committed, steps = [row.committed for row in rows], [row.steps for row in rows]
        found[str(exit)] = {"loss": loss, "committed": committed, "steps": steps}
    return found


def _target(plan: TrainConfig) -> tuple[HFTarget, Template]:
    target = load_target(plan.target, device="cpu")
    assert target.tokenizer is not None
    text = plan.text
    return target, find_template(text.template, target.tokenizer, text.template_kwargs, text.system)
