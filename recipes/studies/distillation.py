"""Does distillation pay? `python -m draftsmith.recipes.studies.distillation --target T --data A --questions Q --out D`.

At equal cost in CPU seconds, three seeds, held-out questions:
    sft, kl                     supervised fine-tuning and forward KL from the live target, two layers each
    sft-slow                    sft at a third of the learning rate, to rule out a poor choice of it
    kl-cached                   forward KL from a teacher already on disk, whose passes cost nothing here
    kl-cached-64, kl-cached-8   as many steps as kl, from a teacher on disk that keeps 64 or 8 tokens per position
    wide-fresh, narrow          two layers of the target's width, and eight narrower ones with as many parameters;
                                fresh layers in both
    sft-long, cached+topk       for both budgets together: SFT, and kl-cached's draft trained further with a tree's loss
    +kl, +sampled, +greedy, +topk   kl's draft trained further, with plain KL or the loss of the rule that will run
Each draft is measured as a greedy chain, a sampled chain (temperature 1) and a top-k tree, four tokens deep.

    D/calibration.json   CPU seconds per step of every run, measured once, in turns: steps = budget / seconds

CPU seconds also hold on a machine that others use. Run again, the study resumes. `--throughput` then decodes with the
wide and the narrow draft, in turns.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from draftsmith.recipes.studies.study import Run, Study, TimedSteps, Way, markdown, step_seconds
from draftsmith.train.drafts.lm import LMBuilder
from draftsmith.train.objectives.distil import Distil
from draftsmith.train.objectives.sft import SFT
from draftsmith.train.run.config import Machine, Optim, Text, TrainConfig, Watch

WAYS = {
    "greedy": Way({"top_k": 1, "num_draft_tokens": 4, "min_confidence": 0.0}),
    "sampled": Way({"top_k": 1, "num_draft_tokens": 4, "min_confidence": 0.0, "sample": True}, temperature=1.0),
    "tree": Way({"top_k": 4, "num_draft_tokens": 4, "nodes": 16, "width": 2, "min_confidence": 0.0}),
}
RULES = ("sampled", "greedy", "topk")
PAIRS = (
    ("kl", "sft"),
    ("kl", "sft-slow"),
    ("kl-cached", "sft"),
    ("kl-cached-64", "kl"),
    ("kl-cached-8", "kl"),
    ("wide-fresh", "narrow"),
    *((f"+{rule}", "+kl") for rule in RULES),
    ("+topk", "sft-long"),
    ("cached+topk", "sft-long"),
)


@dataclass(frozen=True, slots=True)
class Arm:
    """A run with a budget.

    Args:
        name: name of the run.
        distil: Distil's arguments; None: supervised fine-tuning.
        seconds: budget in CPU seconds of training steps.
        steps_of: take this arm's number of steps instead.
        cost_of: the arm whose step costs the same, so that this one's is not measured.
        starts_from: the arm whose draft it continues to train; default: `init`.
        ways: names of the ways it is measured by.
    """

    name: str
    distil: Mapping[str, Any] | None
    seconds: float
    steps_of: str = ""
    cost_of: str = ""
    starts_from: str = ""
    init: str = "first"
    num_layers: int = 2
    shape: Mapping[str, int] | None = None
    lr: float = 1e-3
    ways: Sequence[str] = ("greedy", "sampled", "tree")

    def run(self, config: TrainConfig, steps: int) -> Run:
        shape = None if self.shape is None else dict(self.shape)
        options = {
            "num_layers": self.num_layers, "shape": shape, "init": self.init, "max_steps": steps,
            "optim": replace(config.optim, lr=self.lr),
        }  # fmt: skip
        objective = SFT if self.distil is None else lambda: Distil(**self.distil)
        return Run(self.name, objective, self.ways, options, self.starts_from)

    def timed(self, shared: TrainConfig) -> TimedSteps:
        run = self.run(shared, 1)
        config, objective = replace(shared, **run.options), run.objective()
        exits = objective.exits(config.layers)
        return TimedSteps(config, objective, LMBuilder(exits, config.layers, self.init, config.shape))


def arms(out: Path, seconds: float, tuning_seconds: float, narrow: dict[str, int], lr: float) -> list[Arm]:
    """All arms of the study; an arm comes after the one that it starts from."""
    kl = {"losses": {"forward_kl": 1.0}}
    # Greedy drafting and trees are measured at the target's temperature 0, so that is what they are trained for.
    rules: dict[str, dict[str, Any]] = {
        "kl": kl,
        "sampled": {"losses": {"sampled": 1.0}},
        "greedy": {"losses": {"greedy": 1.0}, "temperature": 0.0},
        "topk": {"losses": {"topk": 1.0}, "temperature": 0.0, "tree_top_k": 4},
    }
    made = [Arm("sft", None, seconds, lr=lr), Arm("kl", kl, seconds, lr=lr)]
    made += [
        Arm(f"+{rule}", distil, tuning_seconds, starts_from="kl", lr=lr / 3) for rule, distil in rules.items()
    ]  # fmt: skip
    teachers = {kept: {"teacher": str(out / f"teacher-{kept}"), "teacher_top_k": kept} for kept in (64, 8)}
    alike = "kl-cached-64"
    made += [
        Arm("sft-long", None, seconds + tuning_seconds, cost_of="sft", lr=lr),
        Arm("kl-cached", {**kl, **teachers[64]}, seconds, cost_of=alike, lr=lr),
        Arm(
            "cached+topk", {**rules["topk"], **teachers[64]}, tuning_seconds, cost_of=alike, starts_from="kl-cached",
            lr=lr / 3,
        ),
    ]  # fmt: skip
    for kept, teacher in teachers.items():
        ways = ("greedy", "sampled")
        made.append(Arm(f"kl-cached-{kept}", {**kl, **teacher}, seconds, steps_of="kl", lr=lr, ways=ways))
    made.append(Arm("wide-fresh", kl, seconds, init="fresh", lr=lr, ways=("greedy",)))
    made.append(Arm("narrow", kl, seconds, init="fresh", num_layers=8, shape=narrow, lr=lr, ways=("greedy",)))
    made.append(Arm("sft-slow", None, seconds, lr=lr / 3, ways=("greedy",)))
    return made


def calibrated(config: TrainConfig, arms: Sequence[Arm]) -> dict[str, int]:
    """Steps of every arm, from one measurement in which they took turns."""
    each = step_seconds(Path(config.out), {arm.name: partial(arm.timed, config) for arm in arms if not arm.cost_of})
    own = {arm.name: max(round(arm.seconds / each[arm.cost_of or arm.name]), 1) for arm in arms}
    return {arm.name: own[arm.steps_of or arm.name] for arm in arms}


def study_of(config: TrainConfig, arms: Sequence[Arm], questions: list[str], **options: Any) -> Study:
    """The study of `arms`, whose numbers of steps are measured first unless they are known."""
    steps = calibrated(config, arms)
    runs = [arm.run(config, steps[arm.name]) for arm in arms]
    return Study(config, runs, WAYS, [(*pair, way) for pair in PAIRS for way in WAYS], questions, **options)


def distillation(
    *,
    target: str,
    data: list[str],
    questions: list[str],
    out: str,
    seconds: float = 120.0,
    tuning_seconds: float = 60.0,
    narrow: dict[str, int] | None = None,
    lr: float = 3e-3,
    seeds: list[int] | None = None,
    max_new_tokens: int = 48,
    limit: int | None = 2000,
    cache: str | None = None,
    throughput: bool = False,
) -> dict[str, Any]:
    """Train and measure what is missing; prints Markdown tables, then the figures as JSON.

    Args:
        target: folder of the model to draft for.
        data: the target's own answers, to train on.
        questions: held-out prompts, none of which may be in the data.
        out: folder of the study.
        seconds: CPU seconds of training steps, for arms that start from the target or fresh.
        tuning_seconds: the same for arms that continue from kl's draft.
        narrow: sizes of the narrow draft's eight layers; default: those for a target of width 512.
        lr: learning rate of the first arms; those that continue take a third of it.
        seeds: default: 0, 1, 2.
        max_new_tokens: tokens decoded per question.
        limit: answers of the data to use.
        cache: folder of tokenised data.
        throughput: only decode with the wide and the narrow draft of the first seed, beside plain decoding.
    """
    if throughput:
        return _throughput(target, questions, Path(out), (seeds or [0])[0])
    sizes = narrow or {"hidden_size": 288, "intermediate_size": 776, "num_attention_heads": 6}
    config = TrainConfig(
        target=target, data=data, out=out, num_layers=2,
        text=Text(max_length=256, held_out=0.04, limit=limit, cache=cache),
        optim=Optim(lr=lr, batch_size=8, micro_batch_size=8), machine=Machine(device="cpu", workers=0),
        watch=Watch(val_every=0, val_packs=8, val_prompts=0, save_every=20),
    )  # fmt: skip
    made = arms(Path(out), seconds, tuning_seconds, sizes, lr)
    results = study_of(config, made, questions, max_new_tokens=max_new_tokens, seeds=seeds or (0, 1, 2)).finish()
    print(markdown(results), file=sys.stderr)
    return results


def _throughput(target: str, questions: Sequence[str], out: Path, seed: int) -> dict[str, Any]:
    from draftsmith.recipes.commands.bench import bench

    folder = out / "throughput"
    how = "top_k=1,num_draft_tokens=3,dtype=bfloat16"  # as a draft is served; training leaves float32
    drafts = [f"{arm}=small:{out / 'runs' / f'{arm}-{seed}'}[{how}]" for arm in ("wide-fresh", "narrow")]
    bench(
        target=target, data=list(questions), drafters=",".join(drafts), max_new_tokens=64, out=str(folder), limit=40,
        min_distinct=0.5,
    )  # fmt: skip
    results: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return results


if __name__ == "__main__":
    from jsonargparse import auto_cli

    print(json.dumps(auto_cli(distillation), indent=1))
