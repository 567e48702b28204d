"""Does sorted training pay? `python -m draftsmith.recipes.studies.bench_learning --config STUDY.yaml`.

Per seed: one draft with exits (soft), one trained at full depth only (sft), and one trained by itself for each shallow
depth (sft-1, sft-2, ...), with the same data, steps and batch. What they are worth is accepted_length on held-out
questions, from each exit, with intervals. Run again, it goes on where it stopped; runs are those of draftsmith.train.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from draftsmith.train.run.settings import Machine, Optim, Text, Watch

# What may differ between one start of a study and the next: which of its runs are done, not what they are.
FREE = ("only", "seeds", "exit_weights")


def bench_learning(
    *,
    target: str,
    data: list[str],
    questions: list[str],
    out: str,
    num_layers: int,
    exits: list[int],
    max_steps: int,
    init: str = "first",
    exit_weights: list[list[float]] | None = None,
    only: list[str] | None = None,
    seeds: list[int] | None = None,
    max_new_tokens: int = 48,
    num_draft_tokens: int = 4,
    text: Text = Text(max_length=512, held_out=0.05),
    optim: Optim = Optim(lr=1e-3, batch_size=4),
    machine: Machine = Machine(device="cpu", workers=0),
) -> dict[str, Any]:
    """Train and measure what is not there yet; the figures as JSON, and as Markdown on the way.

    Args:
        target: folder or Hub name of the model to draft for.
        data: conversations to train on, best the target's own answers; `text.held_out` of them are kept for the loss.
        questions: held-out prompts, none of which may be in the data.
        out: folder of the study.
        num_layers: layers of the whole draft.
        exits: numbers of layers after which it can be left; the last is num_layers.
        max_steps: optimiser steps of every run.
        init: which of the target's layers the drafts begin as.
        exit_weights: other weights of the exits' losses, each a further kind of run (soft-1-1-4).
        only: kinds to train and measure in this process; not given: all. Several processes may share a study.
        seeds: of order; not given: 0, 1, 2.
        max_new_tokens: tokens decoded per question.
        num_draft_tokens: how deep is drafted.
        text: data and template.
        optim: learning rate, batch, optimiser.
        machine: device, precision, workers.
    """
    config = dict(locals())
    from draftsmith.recipes.studies.learning import Decoding, all_kinds, run_study
    from draftsmith.recipes.studies.learning_figures import markdown, summarise
    from draftsmith.recipes.studies.study_figures import read_found
    from draftsmith.train.run.config import TrainConfig

    kinds = all_kinds(num_layers, exits, exit_weights or [])
    unknown = sorted(set(only or []) - {kind.name for kind in kinds})
    if unknown:
        raise ValueError(f"no kind of run is called {unknown[0]!r}: {', '.join(kind.name for kind in kinds)}")
    plan = TrainConfig(
        target=target, data=data, out=out, num_layers=num_layers, init=init, max_steps=max_steps, text=text,
        optim=optim, machine=machine, watch=Watch(val_every=0, val_prompts=0, save_every=50),
    )  # fmt: skip
    _begin(Path(out), config)
    decoding = Decoding(max_new_tokens=max_new_tokens, num_draft_tokens=num_draft_tokens)
    run_study(plan, [kind for kind in kinds if not only or kind.name in only], seeds or [0, 1, 2], questions, decoding)
    results = summarise(*read_found(Path(out)), exits)
    table = markdown(results)
    print(table, file=sys.stderr)
    (Path(out) / "results.md").write_text(table, encoding="utf-8")
    return results


def _begin(out: Path, config: dict[str, Any]) -> None:
    """Write run.json, or refuse to mix another study with the one that is there."""
    from dataclasses import asdict, is_dataclass

    from draftsmith.infer.files.atomic import write_json
    from draftsmith.infer.files.provenance import provenance

    told = {name: asdict(value) if is_dataclass(value) else value for name, value in config.items()}  # type: ignore[arg-type]
    told = json.loads(json.dumps({name: value for name, value in told.items() if name not in FREE}))
    known = out / "run.json"
    if not known.is_file():
        write_json(known, provenance(sys.argv, told))
        return
    before = json.loads(known.read_text(encoding="utf-8"))["config"]
    other = [name for name in told if before.get(name) != told[name]]
    if other:
        raise ValueError(f"{out} holds a study with another {', '.join(other)}: give a new folder")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    print(json.dumps(auto_cli(bench_learning), indent=1))
