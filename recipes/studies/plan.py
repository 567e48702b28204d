"""Are the predictions of `draftsmith plan` right? Predicted speedups beside those of the real loop.

Neither the shapes nor the draft lengths tried here are measured by the survey: their costs are estimated from other
shapes and interpolated between other numbers of tokens. Drafts have random weights and run every pass, but propose the
right tokens with a set acceptance. The accepted_length of that run goes into the prediction, so only the latencies are
tested.

    python -m draftsmith.recipes.studies.plan --target MODEL --batch_sizes '[1,8]'
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from json import dumps
from typing import Any

import torch

from draftsmith.infer.drafters.simulated import SimulatedDrafter
from draftsmith.infer.drafters.small_lm import SmallLM
from draftsmith.infer.measure import tables
from draftsmith.infer.measure.forecast.drafting import Drafting
from draftsmith.infer.measure.plan.loop_timing import LoopTiming, time_loop
from draftsmith.infer.measure.plan.ranking import predict
from draftsmith.infer.measure.plan.shapes import (
    CandidateShape,
    SurveyRequest,
    choose_dtype,
    load_config,
    parse_shapes,
    random_model,
    shaped_config,
)
from draftsmith.infer.measure.plan.survey import Survey, survey
from draftsmith.infer.measure.plan.tables import check_table
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.load import choose_device
from draftsmith.recipes.cli.progress import progress
from draftsmith.recipes.commands.plan import numbers, words

# (layers, share of the target's width): measured; tried, with a number of drafted tokens.
MEASURED = ((1, 1.0), (2, 1.0), (5, 1.0), (1, 0.5), (4, 0.5))
TRIED = ((3, 1.0, 3), (4, 1.0, 7), (2, 0.5, 5), (3, 0.5, 10), (2, 0.75, 5))
LENGTHS = (1, 2, 4, 8, 12)
WITHIN = 0.15


def check_plan(
    target: str,
    pairs: str = "",
    shapes: str = "",
    batch_sizes: Sequence[int] = (1, 8),
    context: int = 128,
    max_new_tokens: int = 64,
    acceptance: float = 0.7,
    repeats: int = 5,
    dtype: str = "auto",
    device: str = "auto",
    seconds: float = 300.0,
    json: bool = False,
) -> int:
    """Predict speedups of shapes and lengths that were not measured, then measure them; 0 if four of five hold.

    Args:
        target: folder, Hub name or config.json; only the config is read.
        pairs: SHAPE@LENGTH, comma-separated; by default five between the measured shapes.
        shapes: shapes to measure, instead of the default ones.
        batch_sizes: rows decoded together.
        context: tokens of the prompts.
        max_new_tokens: tokens of each answer.
        acceptance: the share of drafted tokens that are right.
        repeats: how often every pair and plain decoding are timed.
        dtype: of the weights; auto is the config's.
        device: auto is CUDA if available.
        seconds: time to spend on timing the passes.
        json: print one JSON object on the last line.
    """
    config = load_config(target)
    kind, where = choose_dtype(config, dtype), choose_device(device)
    width = int(config.get_text_config().hidden_size)
    defaults = [f"{layers}x{int(width * share)}" for layers, share in MEASURED]
    measured = parse_shapes(words(shapes) or defaults, config)
    defaults = [f"{layers}x{int(width * share)}@{length}" for layers, share, length in TRIED]
    tried = [_pair(word) for word in words(pairs) or defaults]
    estimated = [shape for shape in parse_shapes([str(shape) for shape, _ in tried], config) if shape not in measured]
    sizes = numbers("batch_sizes", batch_sizes)
    asked = SurveyRequest(sizes, (max(1, context // 2), 2 * context), LENGTHS, measured, estimated)
    found = survey(config, kind, where, asked, seconds=seconds, say=progress)
    drafters = {
        f"{shape}@{length}": _drafter(config, shape, length, acceptance, kind, where) for shape, length in tried
    }
    model = HFTarget(random_model(config, kind, where))
    rows: list[dict[str, Any]] = []
    for size in sizes:
        progress(f"the loop at batch size {size}")
        timings = time_loop(model, drafters, rows=size, context=context, new_tokens=max_new_tokens, rounds=repeats)
        for shape, length in tried:
            rows.append(_row(found, shape, length, size, context + max_new_tokens / 2, timings[f"{shape}@{length}"]))
    good = within(rows, WITHIN)
    if json:
        print(dumps({"machine": found.machine, "pairs": rows, "within": good, "total": len(rows), "limit": WITHIN}))
    else:
        tables.show([check_table(rows)])
        print(f"{good} of {len(rows)} predictions within {WITHIN:.0%} of the measured speedup")
    return 0 if good >= 0.8 * len(rows) else 1


def _drafter(
    config: Any, shape: CandidateShape, length: int, acceptance: float, dtype: torch.dtype, device: torch.device
) -> SimulatedDrafter:
    model = random_model(shaped_config(config, shape), dtype, device)
    return SimulatedDrafter(SmallLM(model, num_draft_tokens=length, top_k=1, min_confidence=0.0), acceptance)


def _row(
    found: Survey, shape: CandidateShape, length: int, rows: int, context: float, timing: LoopTiming
) -> dict[str, Any]:
    """Measured and predicted speedup, and the prediction's relative error."""
    predicted = predict(found, str(shape), Drafting.chain(length), rows, context, timing.accepted_length)
    return {
        "shape": str(shape),
        "length": length,
        "batch_size": rows,
        "shape_measured": shape in found.asked.shapes,
        "length_measured": length in found.asked.nodes,
        "accepted_length": timing.accepted_length,
        "measured": timing.speedup,
        "predicted": predicted.speedup,
        "error": predicted.speedup / timing.speedup - 1,
        "step_s": timing.step_s,
        "predicted_step_s": predicted.step_s,
    }


def within(rows: Sequence[dict[str, Any]], limit: float) -> int:
    """How many predictions are off by no more than `limit`."""
    return sum(abs(row["error"]) <= limit for row in rows)


def _pair(word: str) -> tuple[CandidateShape, int]:
    shape, _, length = word.partition("@")
    if not length.isdecimal() or int(length) < 1:
        raise ValueError(f"{word!r} is no pair: write SHAPE@LENGTH, such as 3x512@4")
    return CandidateShape.parse(shape), int(length)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    sys.exit(auto_cli(check_plan, as_positional=False))
