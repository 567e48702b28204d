"""Which draft pays for its training?

    python -m draftsmith.recipes.studies.head_training --target T --data A --questions Q --out D

At equal cost in CPU seconds, several seeds, held-out questions:
    eagle, eagle-1    an EAGLE-3 head with training-time test (three unrolls), and without (one)
    medusa, hydra     four heads each
    small             two of the target's layers, distilled
Each learns the target's distribution (forward KL) and is measured with equal trees of its likeliest tokens, four tokens
deep and with at most 16 nodes, at temperature 0 and 0.8, and as a greedy chain of four.

    D/calibration.json   CPU seconds per step of every draft, measured once, in turns: steps = budget / seconds
    D/runs, D/measured   as in study.py

CPU seconds also hold on a machine that others use. Run again, the study resumes. `--speed` then decodes with the first
seed's drafts, in turns, as they come by default, at both temperatures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from draftsmith.infer.drafters import Eagle, Hydra, Medusa, SmallLM
from draftsmith.infer.files.atomic import write_json
from draftsmith.infer.measure.metrics import Totals
from draftsmith.infer.models.load import load_target
from draftsmith.infer.text.records import read_records
from draftsmith.infer.text.templates import find_template
from draftsmith.recipes.studies.study import ROWS_AT_ONCE, Study, TimedSteps, Way, markdown, run_json, step_seconds
from draftsmith.train.drafts.eagle import EagleBuilder
from draftsmith.train.drafts.hydra import HydraBuilder
from draftsmith.train.drafts.lm import LMBuilder
from draftsmith.train.drafts.medusa import MedusaBuilder
from draftsmith.train.objectives.distil import Distil
from draftsmith.train.objectives.eagle import EagleObjective
from draftsmith.train.objectives.future_tokens import FutureTokens
from draftsmith.train.run.config import Machine, Optim, RunConfig, Text, TrainConfig, Watch
from draftsmith.train.run.run import train_draft, train_heads
from draftsmith.train.run.validation import decode

TREE = {"top_k": 4, "num_draft_tokens": 4, "nodes": 16, "min_confidence": 0.0, "sample": "likeliest"}
WAYS = {
    "tree": Way(TREE),
    "tree at 0.8": Way(TREE, temperature=0.8),
    "chain": Way({**TREE, "top_k": 1}),
}
PAIRS = (("eagle", "medusa"), ("hydra", "medusa"), ("eagle", "small"), ("eagle", "eagle-1"), ("eagle", "hydra"))
FACTORIES: Mapping[str, Callable[..., Any]] = {"eagle": Eagle, "medusa": Medusa, "hydra": Hydra, "small": SmallLM}


OptimName: TypeAlias = Literal["adamw", "muon"]


@dataclass(frozen=True, slots=True)
class TrainedDraft:
    """A draft of the study: its name, the drafter that runs it, the objective and the builder that train it, and its
    optimiser. `layers`: of a small language model, which a head does not have."""

    name: str
    drafter: str
    objective: Callable[[], Any]
    builder: Any
    optim: OptimName
    lr: float
    layers: int = 0

    def config(self, shared: RunConfig, **changes: Any) -> RunConfig:
        config = replace(shared, optim=replace(shared.optim, name=self.optim, lr=self.lr), **changes)
        if not self.layers:
            return config
        return TrainConfig(**{one.name: getattr(config, one.name) for one in fields(config)}, num_layers=self.layers)

    def timed(self, shared: RunConfig) -> TimedSteps:
        return TimedSteps(self.config(shared), self.objective(), self.builder)

    def train(self, config: RunConfig) -> None:
        if isinstance(config, TrainConfig):
            train_draft(self.objective(), config)
        else:
            train_heads(self.objective(), config, self.builder)


def drafts(
    unrolls: int, draft_vocab: int, layers: int, lr: float, heads_lr: float, small_lr: float
) -> list[TrainedDraft]:
    """All drafts of the study."""

    def eagle(name: str, unrolls: int) -> TrainedDraft:
        builder = EagleBuilder(unrolls=unrolls, draft_vocab=draft_vocab)
        return TrainedDraft(name, "eagle", EagleObjective, builder, "muon", lr)

    return [
        eagle("eagle", unrolls),
        eagle("eagle-1", 1),
        TrainedDraft("medusa", "medusa", FutureTokens, MedusaBuilder(4), "adamw", heads_lr),
        TrainedDraft("hydra", "hydra", FutureTokens, HydraBuilder(4), "adamw", heads_lr),
        TrainedDraft("small", "small", Distil, LMBuilder([layers], layers), "muon", small_lr, layers),
    ]


def measured(draft: TrainedDraft, config: RunConfig, study: Study) -> dict[str, Any]:
    """Committed tokens and steps of every question, for each of the study's ways."""
    target = load_target(config.target, device="cpu")
    assert target.tokenizer is not None
    template = find_template(config.text.template, target.tokenizer)
    prompts = [template.prompt_ids(record.prompt) for record in read_records(study.questions, need="questions")]
    found: dict[str, Any] = {"loss": run_json(Path(config.out)).get("results", {})}
    for name, way in study.ways.items():
        # Costs that were measured here would cut the trees of some drafts and not of others.
        drafter = FACTORIES[draft.drafter](config.out, **way.drafter, calibration="none", costs="none")
        answers = decode(target, drafter, prompts, study.max_new_tokens, way.temperature, ROWS_AT_ONCE)
        rows = [Totals.of(answer.traces) for answer in answers]
        found[name] = {"committed": [row.committed for row in rows], "steps": [row.steps for row in rows]}
    return found


def head_training(
    *,
    target: str,
    data: list[str],
    questions: list[str],
    out: str,
    seconds: float = 300.0,
    unrolls: int = 3,
    draft_vocab: int = 4096,
    small_layers: int = 2,
    lr: float = 6e-3,
    heads_lr: float = 1e-3,
    small_lr: float = 3e-3,
    seeds: list[int] | None = None,
    only: list[str] | None = None,
    max_new_tokens: int = 64,
    max_length: int = 256,
    limit: int | None = 2000,
    batch_size: int = 4,
    ways: list[str] | None = None,
    cache: str | None = None,
    speed: bool = False,
) -> dict[str, Any]:
    """Train and measure what is missing; prints Markdown tables, then the figures as JSON.

    Args:
        target: folder of the model to draft for.
        data: the target's own answers, to train on.
        questions: held-out prompts, none of which may be in the data.
        out: folder of the study.
        seconds: CPU seconds of training steps, for each draft and seed.
        unrolls: of training-time test.
        draft_vocab: tokens that the EAGLE heads can draft; 0: all.
        small_layers: layers of the small draft.
        lr: learning rate of the EAGLE heads (Muon).
        heads_lr: that of Medusa's and Hydra's (AdamW).
        small_lr: that of the small draft (Muon).
        seeds: default: 0, 1, 2.
        only: the drafts to train and compare; default: all.
        max_new_tokens: tokens decoded per question.
        max_length: tokens of a packed row.
        limit: answers of the data to use.
        batch_size: packed rows per step.
        ways: how to decode: tree, tree at 0.8, chain; default: all.
        cache: folder of tokenised data.
        speed: only decode with the drafts of the first seed, beside plain decoding.
    """
    made = drafts(unrolls, draft_vocab, small_layers, lr, heads_lr, small_lr)
    names = {one.name for one in made}
    if unknown := sorted(set(only or names) - names):
        raise ValueError(f"only: {', '.join(unknown)}: there are {', '.join(sorted(names))}")
    made = [one for one in made if one.name in (only or names)]
    chosen = seeds or [0, 1, 2]
    if speed:
        return _speeds(target, questions, Path(out), made, chosen[0], max_new_tokens)
    shared = RunConfig(
        target, data, out, text=Text(max_length=max_length, held_out=0.04, limit=limit, cache=cache),
        optim=Optim(batch_size=batch_size, micro_batch_size=batch_size, warmup=0.05),
        machine=Machine(device="cpu", workers=0), watch=Watch(val_every=0, val_packs=4, val_prompts=0, save_every=20),
    )  # fmt: skip
    decoded = {name: way for name, way in WAYS.items() if name in (ways or WAYS)}
    pairs = [(*pair, way) for pair in PAIRS for way in decoded if names.intersection(only or names) >= set(pair)]
    plain = TrainConfig(target, data, out, num_layers=small_layers, text=shared.text)
    study = Study(plain, [], decoded, pairs, questions, max_new_tokens, chosen)
    each = step_seconds(study.out, {draft.name: partial(draft.timed, shared) for draft in made})
    steps = {draft.name: max(round(seconds / each[draft.name]), 1) for draft in made}
    for seed in chosen:
        for draft in made:
            folder = study.folder(draft.name, seed)
            config = draft.config(shared, out=str(folder), seed=seed, max_steps=steps[draft.name])
            if run_json(folder).get("state") != "finished":
                print(f"training {draft.name}, seed {seed}, {steps[draft.name]} steps", file=sys.stderr, flush=True)
                draft.train(config)
            if not study.measured(draft.name, seed).is_file():
                print(f"measuring {draft.name}, seed {seed}", file=sys.stderr, flush=True)
                write_json(study.measured(draft.name, seed), measured(draft, config, study))
    results = {**study.finish(), "steps": steps}
    print(markdown(results), file=sys.stderr)
    return results


def _speeds(
    target: str, questions: Sequence[str], out: Path, made: Sequence[TrainedDraft], seed: int, max_new_tokens: int
) -> dict[str, Any]:
    from draftsmith.recipes.commands.bench import bench

    found = {}
    for temperature in (0.0, 0.8):
        folder = out / f"speed-{temperature}"
        if not (folder / "results.json").is_file():
            names = [f"{draft.name}={draft.drafter}:{out / 'runs' / f'{draft.name}-{seed}'}" for draft in made]
            bench(
                target=target, data=list(questions), drafters=",".join(names), max_new_tokens=max_new_tokens,
                temperature=temperature, out=str(folder), min_distinct=0.5,
            )  # fmt: skip
        found[str(temperature)] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return found
