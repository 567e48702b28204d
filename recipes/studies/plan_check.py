"""Does `plan` tell the truth? Its predicted ratios to plain decoding beside those of the real loop.

Drafts of the shape in question, with random weights, run their passes and are told their tokens (drafters/rehearsed.py)
with a set acceptance; the accepted_length of that very run goes into the prediction, so that only the latencies are on
trial. A pair is fair if neither its shape nor its number of verified tokens was measured by the survey.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from draftsmith.infer.drafters.simulated import SimulatedDrafter
from draftsmith.infer.drafters.small_lm import SmallLM
from draftsmith.infer.measure.plan.loop_timing import time_loop
from draftsmith.infer.measure.plan.ranking import Drafting, predict
from draftsmith.infer.measure.plan.shapes import CandidateShape, random_model, shaped_config
from draftsmith.infer.measure.plan.survey import Survey
from draftsmith.infer.models.hf_target import HFTarget


def check(
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    survey: Survey,
    pairs: Sequence[tuple[str, int]],
    *,
    rows: int,
    context: int,
    new_tokens: int = 64,
    acceptance: float = 0.7,
    rounds: int = 5,
) -> list[dict[str, Any]]:
    """Per (shape, length): measured and predicted speedup, and the prediction's relative error."""
    target = HFTarget(random_model(config, dtype, device))
    models = {name: random_model(shaped_config(config, CandidateShape.parse(name)), dtype, device) for name, _ in pairs}
    drafters = {
        f"{shape}, {length} tokens": SimulatedDrafter(
            SmallLM(models[shape], num_draft_tokens=length, top_k=1, min_confidence=0.0), acceptance
        )
        for shape, length in pairs
    }
    heard = time_loop(target, drafters, rows=rows, context=context, new_tokens=new_tokens, rounds=rounds)
    found = []
    for name, (shape, length) in zip(drafters, pairs):
        one = heard[name]
        said = predict(survey, shape, Drafting.chain(length), rows, context + new_tokens / 2, one.accepted_length)
        found.append(
            {
                "shape": shape,
                "length": length,
                "batch_size": rows,
                "shape_measured": CandidateShape.parse(shape) in survey.asked.shapes,
                "length_measured": length in survey.asked.nodes,
                "accepted_length": one.accepted_length,
                "measured": one.speedup,
                "predicted": said.speedup,
                "error": said.speedup / one.speedup - 1,
                "step_s": one.step_s,
                "predicted_step_s": said.step_s,
            }
        )
    return found


def within(rows: Sequence[dict[str, Any]], limit: float) -> int:
    """How many predictions are off by no more than this share."""
    return sum(abs(row["error"]) <= limit for row in rows)
