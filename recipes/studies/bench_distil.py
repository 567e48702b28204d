"""Is distillation worth it? `python -m draftsmith.recipes.studies.bench_distil --target T --data A --questions Q --out
DIR`.

At equal cost in CPU seconds, three seeds, held-out questions:
    sft, kl                     supervised fine-tuning against forward KL from the live target, two layers each
    sft-slow                    the first at a third of the learning rate, lest it be that
    kl-cached                   forward KL from a teacher that is on disk already, so that its passes cost nothing here
    kl-cached-64, kl-cached-8   kl's steps again, from a teacher on disk that keeps so many tokens a position
    wide-fresh, narrow          two layers of the target's width against eight narrower ones of as many parameters,
                                layers fresh in both
    sft-long, cached+topk       for both budgets together: SFT, and kl-cached's draft trained on with the loss of a tree
    +kl, +sampled, +greedy, +topk   kl's draft trained on: with plain KL, or with the loss of the rule that will run
Each draft is measured as a greedy chain, a sampled chain (temperature 1) and a top-k tree (four tokens deep). Run
again, it goes on where it stopped. `--throughput` then decodes with the wide and the narrow draft, taking turns.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.train.run.settings import Machine, Optim, Text, Watch

if TYPE_CHECKING:
    from draftsmith.recipes.studies.distil_study import Arm

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


def arms(out: Path, seconds: float, tuning_seconds: float, narrow: dict[str, int], lr: float) -> list[Arm]:
    """All arms of the study, those that others begin from before them."""
    from draftsmith.recipes.studies.distil_study import Arm

    kl = {"losses": {"forward_kl": 1.0}}
    # Greedy drafting and trees are measured at the target's temperature 0, so that is what they are trained for.
    rules: dict[str, dict[str, Any]] = {
        "kl": kl,
        "sampled": {"losses": {"sampled": 1.0}},
        "greedy": {"losses": {"greedy": 1.0}, "temperature": 0.0},
        "topk": {"losses": {"topk": 1.0}, "temperature": 0.0, "top_k": 4},
    }
    made = [Arm("sft", None, seconds, lr=lr), Arm("kl", kl, seconds, lr=lr)]
    made += [
        Arm(f"+{rule}", distil, tuning_seconds, begins_as="kl", lr=lr / 3) for rule, distil in rules.items()
    ]  # fmt: skip
    teachers = {kept: {"teacher": str(out / f"teacher-{kept}"), "teacher_top_k": kept} for kept in (64, 8)}
    alike = "kl-cached-64"
    made += [
        Arm("sft-long", None, seconds + tuning_seconds, cost_of="sft", lr=lr),
        Arm("kl-cached", {**kl, **teachers[64]}, seconds, cost_of=alike, lr=lr),
        Arm(
            "cached+topk", {**rules["topk"], **teachers[64]}, tuning_seconds, cost_of=alike, begins_as="kl-cached",
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


def bench_distil(
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
    """Train and measure what is not there yet; the figures as JSON, and as Markdown on the way.

    Args:
        target: folder of the model to draft for.
        data: its own answers, to train on.
        questions: held-out prompts, none of which may be in the data.
        out: folder of the study.
        seconds: CPU seconds of training steps, for arms that begin from the target or fresh.
        tuning_seconds: the same for arms that go on from kl's draft.
        narrow: sizes of the narrow draft's eight layers; not given: those for a target of width 512.
        lr: of the first arms; a third of it for those that go on.
        seeds: not given: 0, 1, 2.
        max_new_tokens: tokens decoded per question.
        limit: so many answers of the data.
        cache: folder of tokenised data.
        throughput: only decode with the wide and the narrow draft of the first seed, beside plain decoding.
    """
    from draftsmith.recipes.studies.distil_figures import markdown, summarise
    from draftsmith.recipes.studies.distil_study import Study, run_study
    from draftsmith.recipes.studies.study_figures import read_found
    from draftsmith.train.run.config import TrainConfig

    if throughput:
        return _throughput(target, questions, Path(out), (seeds or [0])[0])
    sizes = narrow or {"hidden_size": 288, "intermediate_size": 776, "num_attention_heads": 6}
    plan = TrainConfig(
        target=target, data=data, out=out, num_layers=2,
        text=Text(max_length=256, held_out=0.04, limit=limit, cache=cache),
        optim=Optim(lr=lr, batch_size=8, micro_batch_size=8), machine=Machine(device="cpu", workers=0),
        watch=Watch(val_every=0, val_packs=8, val_prompts=0, save_every=20),
    )  # fmt: skip
    made = arms(Path(out), seconds, tuning_seconds, sizes, lr)
    run_study(Study(plan, made, questions, max_new_tokens, seeds or [0, 1, 2]))
    results = summarise(*read_found(Path(out)), PAIRS)
    for side in ("all", "not_looping"):
        print(markdown(results, side), file=sys.stderr)
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

    print(json.dumps(auto_cli(bench_distil), indent=1))
