"""A finished draft as a plain Hugging Face folder: weights, config, tokenizer, generation config, curves.

The config says where the draft can be left (`sorted_exits`) and which template it was trained with; everything else is
what any model of its family has, and no code of ours is needed to load it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from draftsmith.train.run.run_record import Metrics


def save_model(
    folder: Path,
    model: Any,
    tokenizer: Any,
    *,
    exits: Sequence[int],
    template_fingerprint: str = "",
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write everything beside its place, then move it in; config.json comes last."""
    part = folder / f".model.{os.getpid()}.part"
    try:
        part.mkdir(parents=True)
        config = model.config
        if len(exits) > 1:
            config.sorted_exits = list(exits)
        elif hasattr(config, "sorted_exits"):
            del config.sorted_exits
        if template_fingerprint:
            config.template_fingerprint = template_fingerprint
        config.dtype = next(model.parameters()).dtype
        model.save_pretrained(part, state_dict=state)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        for path in sorted(part.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, folder / path.name)
    except OSError as error:
        raise ValueError(f"{folder}: the model could not be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def draw_curves(metrics: Metrics, path: Path, exits: Sequence[int]) -> None:
    """Loss and accepted_length per exit over the steps."""
    from matplotlib.figure import Figure

    rows = metrics.rows()
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, exit in enumerate(exits):
        colour = f"C{number}"
        for kind, style in (("train", {"linewidth": 0.8, "alpha": 0.5}), ("held_out", {"marker": "o"})):
            x, y = _column(rows, kind, f"loss_exit_{exit}")
            left.plot(x, y, color=colour, label=f"exit {exit}, {kind.replace('_', '-')}", **style)
        right.plot(*_column(rows, "held_out", f"accepted_length_exit_{exit}"), marker="o", label=f"exit {exit}")
    left.set(xlabel="step", ylabel="loss (nats per token)")
    right.set(xlabel="step", ylabel="accepted_length (held-out prompts)")
    left.legend(fontsize="small")
    right.legend(fontsize="small")
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png", dpi=120)
    os.replace(part, path)


def _column(rows: list[dict[str, str]], kind: str, name: str) -> tuple[list[int], list[float]]:
    points = [(int(row["step"]), float(row[name])) for row in rows if row["kind"] == kind and row[name]]
    return [x for x, _ in points], [y for _, y in points]
