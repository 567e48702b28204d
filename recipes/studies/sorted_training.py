"""Does sorted training pay? `python -m draftsmith.recipes.studies.sorted_training --config STUDY.yaml`.

Per seed: one draft with exits (soft), one trained at full depth only (sft), and one trained alone for each shallow
depth (sft-1, sft-2, ...), with the same data, steps and batch. Compared is the accepted_length at each exit on held-out
questions. Run again, the study resumes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from draftsmith.infer.files.atomic import write_json
from draftsmith.infer.files.provenance import provenance
from draftsmith.recipes.studies.study import Pair, Run, Study, Way, markdown, read_measured
from draftsmith.train.drafts.exits import check_exits
from draftsmith.train.objectives.sft import SFT
from draftsmith.train.objectives.soft import SoFT
from draftsmith.train.run.config import Machine, Optim, Text, TrainConfig, Watch

# Options that may change between two starts of a study: they choose its runs, and do not change them.
FREE = ("only", "seeds", "exit_weights")


def all_runs(num_layers: int, exits: Sequence[int], weights: Iterable[Sequence[float]] = ()) -> list[Run]:
    """soft, sft, sft-K for every shallow exit, and soft with each of the other `weights` of its exits."""
    known = check_exits(exits, num_layers)
    ways, whole = [str(exit) for exit in known], {"num_layers": num_layers}
    runs = [Run("soft", lambda: SoFT(known), ways, whole), Run("sft", SFT, ways, whole)]
    runs += [Run(f"sft-{exit}", SFT, [str(exit)], {"num_layers": exit}) for exit in known[:-1]]
    for given in weights:
        SoFT(known, given)
        name = "soft-" + "-".join(f"{weight:g}" for weight in given)
        runs.append(Run(name, lambda given=given: SoFT(known, given), ways, whole))  # type: ignore[misc]
    return runs


def all_pairs(names: Iterable[str], exits: Sequence[int]) -> list[Pair]:
    """Every sorted run over sft at the same exit, and over the draft trained for that depth alone."""
    sorted_runs = [name for name in names if name.startswith("soft")]
    return [(one, other, str(exit)) for one in sorted_runs for exit in exits for other in ("sft", f"sft-{exit}")]


def sorted_training(
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
    """Train and measure what is missing; prints Markdown tables, then the figures as JSON.

    Args:
        target: folder or Hub name of the model to draft for.
        data: conversations to train on, best the target's own answers; `text.held_out` of them are kept for the loss.
        questions: held-out prompts, none of which may be in the data.
        out: folder of the study.
        num_layers: layers of the whole draft.
        exits: layer counts after which it can exit; the last is num_layers.
        max_steps: optimiser steps of every run.
        init: the target's layers that the drafts start from.
        exit_weights: other loss weights of the exits, each a further run (soft-1-1-4).
        only: runs to train and measure in this process; default: all. Several processes may share a study.
        seeds: default: 0, 1, 2.
        max_new_tokens: tokens decoded per question.
        num_draft_tokens: length of the drafted chains.
        text: data and template.
        optim: learning rate, batch, optimiser.
        machine: device, precision, workers.
    """
    config = dict(locals())
    runs = all_runs(num_layers, exits, exit_weights or [])
    unknown = sorted(set(only or []) - {run.name for run in runs})
    if unknown:
        raise ValueError(f"no run is called {unknown[0]!r}: {', '.join(run.name for run in runs)}")
    _begin(Path(out), config)
    names = dict.fromkeys([*(run.name for run in runs), *(name for name, _ in read_measured(Path(out))[0])])
    shared = TrainConfig(
        target=target, data=data, out=out, init=init, max_steps=max_steps, text=text, optim=optim, machine=machine,
        watch=Watch(val_every=0, val_prompts=0, save_every=50),
    )  # fmt: skip
    results = Study(
        shared,
        [run for run in runs if not only or run.name in only],
        {str(exit): Way({"num_draft_tokens": num_draft_tokens}, exit=exit) for exit in exits},
        all_pairs(names, exits),
        questions,
        max_new_tokens,
        seeds or (0, 1, 2),
    ).finish()
    table = markdown(results)
    print(table, file=sys.stderr)
    (Path(out) / "results.md").write_text(table, encoding="utf-8")
    return results


def _begin(out: Path, config: dict[str, Any]) -> None:
    """Write run.json, or refuse to mix this study with another one in the same folder."""
    given = {name: asdict(value) if is_dataclass(value) else value for name, value in config.items()}  # type: ignore[arg-type]
    given = json.loads(json.dumps({name: value for name, value in given.items() if name not in FREE}))
    path = out / "run.json"
    if not path.is_file():
        write_json(path, provenance(sys.argv, given))
        return
    before = json.loads(path.read_text(encoding="utf-8"))["config"]
    other = [name for name in given if before.get(name) != given[name]]
    if other:
        raise ValueError(f"{out} holds a study with another {', '.join(other)}: give a new folder")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    print(json.dumps(auto_cli(sorted_training), indent=1))
