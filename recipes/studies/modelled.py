"""Do modelled pass costs hold? `python -m draftsmith.recipes.studies.modelled`

The constants of this CPU are measured in seconds, as `plan --machine cpu` measures them; then the passes of ten random
models are modelled from them and timed. Both count the process's own CPU time, since a busy machine would change the
ratio between one minute and the next, and the constants are the mean of those before and after each model.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from draftsmith.infer.costs.pass_costs import PassCost
from draftsmith.infer.costs.roofline import pass_cost
from draftsmith.infer.costs.timing import PassShape, measure_together
from draftsmith.infer.files.atomic import write_json
from draftsmith.infer.files.provenance import hardware
from draftsmith.infer.measure.plan.shapes import random_model
from draftsmith.infer.measure.plan.this_machine import GROUP_BYTES, this_machine
from draftsmith.infer.measure.plan.work import work_of
from draftsmith.infer.models.architectures import prepare
from draftsmith.infer.models.decoding_runner import decoding_runner
from draftsmith.infer.models.pass_timer import CachedPassTimer

WITHIN, OF = 0.2, 0.8


@dataclass(frozen=True, slots=True)
class TriedShape:
    """A Llama of this shape, and a pass of `tokens` tokens behind `context` committed ones."""

    layers: int
    hidden: int
    heads: int
    groups: int
    vocab: int
    tokens: int
    context: int

    def config(self) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 11 // 4,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )


TRIED = (
    TriedShape(8, 512, 8, 8, 8192, 1, 128),
    TriedShape(8, 512, 8, 8, 8192, 16, 128),
    TriedShape(8, 1024, 16, 16, 12288, 1, 128),
    TriedShape(8, 1024, 16, 4, 32000, 4, 2048),
    TriedShape(12, 768, 12, 12, 16384, 8, 512),
    TriedShape(4, 1024, 16, 16, 8192, 64, 128),
    TriedShape(16, 512, 8, 2, 8192, 2, 1024),
    TriedShape(2, 1536, 24, 8, 16384, 32, 256),
    TriedShape(24, 640, 10, 5, 8192, 1, 4096),
    TriedShape(6, 896, 14, 7, 24576, 12, 256),
)


def modelled(
    *,
    out: str = "",
    dtype: str = "float32",
    threads: int = 1,
    shapes: int = len(TRIED),
    seconds: float = 8.0,
    group_mib: int = GROUP_BYTES >> 20,
) -> int:
    """Model the passes of ten shapes, time them, and compare; 0 if eight of ten are within 20 %.

    Args:
        out: file for the figures.
        dtype: of the weights.
        threads: of torch.
        shapes: how many of the ten to try.
        seconds: to time each shape's pass for.
        group_mib: MiB of weights that each product is measured on.
    """
    torch.set_num_threads(threads)
    kind: torch.dtype = getattr(torch, dtype)
    rows = []
    print("shape                        tokens context  modelled  measured   error")
    for tried in TRIED[:shapes]:
        before = this_machine(tried.config(), kind, time.process_time, group_mib << 20)
        measured_s = _measured(tried, kind, seconds)
        after = this_machine(tried.config(), kind, time.process_time, group_mib << 20)
        work = work_of(tried.config(), kind)
        both = [pass_cost(one, replace(work)) for one in (before, after)]
        rows.append(_row(tried, sum(_of(cost, tried) for cost in both) / 2, measured_s))
        print(_line(rows[-1]))
    good = sum(abs(row["error"]) <= WITHIN for row in rows)
    print(f"{good} of {len(rows)} within {WITHIN:.0%} of the measured seconds")
    if out:
        write_json(
            Path(out), {"hardware": hardware(), "dtype": dtype, "threads": threads, "rows": rows, "within": good}
        )
    return 0 if good >= OF * len(rows) else 1


def _of(cost: PassCost, tried: TriedShape) -> float:
    return cost.even(1, tried.tokens, tried.context)


def _measured(tried: TriedShape, dtype: torch.dtype, seconds: float) -> float:
    """Seconds of CPU time of the pass, as the engine runs it."""
    model = random_model(tried.config(), dtype, torch.device("cpu"))
    timer = CachedPassTimer(decoding_runner(model, prepare(model)))
    tokens = next((bucket for bucket in timer.buckets if bucket >= tried.tokens), tried.tokens)
    jobs = {"": (timer, [PassShape(1, tokens, tried.context)])}
    return measure_together(jobs, seconds=seconds, clock=time.process_time)[""][0].seconds


def _row(tried: TriedShape, modelled_s: float, measured_s: float) -> dict[str, Any]:
    shape = {name: getattr(tried, name) for name in TriedShape.__dataclass_fields__}
    return shape | {"modelled_s": modelled_s, "measured_s": measured_s, "error": modelled_s / measured_s - 1}


def _line(row: dict[str, Any]) -> str:
    name = f"{row['layers']}x{row['hidden']}, {row['heads']}/{row['groups']} heads, {row['vocab']}"
    times = f"{row['modelled_s'] * 1e3:>6.1f} ms {row['measured_s'] * 1e3:>6.1f} ms"
    return f"{name:<28} {row['tokens']:>6} {row['context']:>7} {times} {row['error']:>+7.0%}"


if __name__ == "__main__":
    from draftsmith.recipes.studies import run_study

    sys.exit(run_study(modelled))
