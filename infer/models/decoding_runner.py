"""The runner that a model decodes with: buckets measured on a CPU, passes captured on a CUDA device.

Capturing is done at load, so that no step waits for it: all sizes of a small batch within the first slots of the arena.
Larger ones are captured when they first occur. Before that, one pass is compared with the same pass run eagerly; a
model whose captured passes give other logits runs eagerly, and says so.

Legend: N tokens of a pass, V vocabulary.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch

from draftsmith.infer.models.pass_timer import measured_buckets
from draftsmith.infer.models.positions import max_positions
from draftsmith.infer.models.probe import HALF_TOLERANCE, OWN_TOLERANCE, TREES, difference, tokens_to_try
from draftsmith.infer.models.runner.arena import LASTING_SLOTS
from draftsmith.infer.models.runner.captured import TOKENS
from draftsmith.infer.models.runner.entries import Entries
from draftsmith.infer.models.runner.masks import MaskPlan
from draftsmith.infer.models.runner.model_runner import ModelRunner

# Captured at load: passes of up to WARM_TOKENS tokens, behind contexts that fit an arena of WARM_SLOTS slots.
WARM_TOKENS, WARM_SLOTS = 64, 4096


def decoding_runner(model: Any, plan: MaskPlan, buckets: Sequence[int] | None = None) -> ModelRunner:
    """A runner of `model` for its device. `buckets`: as of ModelRunner; None: those that are found to be fast."""
    if next(model.parameters()).device.type != "cuda":
        return ModelRunner(model, plan, measured_buckets(model, plan) if buckets is None else buckets)
    lm = ModelRunner(model, plan, TOKENS if buckets is None else buckets)
    if lm.capture():
        warm_up(lm)
    return lm


def warm_up(lm: ModelRunner, slots: int = WARM_SLOTS) -> None:
    """Capture the passes of one small batch, after comparing one with the same pass run eagerly."""
    assert lm.captured is not None
    row = object()
    lm.open(row, slots * 3 // 4 - LASTING_SLOTS)
    try:
        lm.forward([row], [Entries.chain([0])])  # the first pass makes the arena's buffers
        lm.drop([row])
        error = captured_error(lm)
        tolerance = OWN_TOLERANCE.get(lm.dtype, HALF_TOLERANCE)
        if not error < tolerance:
            lm.captured.refuse(f"they differ from eager ones by {error:.2g} of the logits' spread")
        sizes = [tokens for tokens in TOKENS if tokens <= WARM_TOKENS]
        reads = [LASTING_SLOTS << i for i in range((lm.cache.size // LASTING_SLOTS).bit_length())]
        longest = max_positions(lm.model.config.get_text_config()) - 1
        shapes = [(tokens, read // 2) for read in reads for tokens in sizes if read // 2 <= longest]
        for done, (tokens, context) in enumerate(shapes):
            if lm.captured.refusal:
                break
            _say(f"capturing passes: {done + 1} of {len(shapes)}")
            lm.place([row], context)
            lm.forward([row], [Entries([0] * tokens, [-1] * tokens)])
            lm.drop([row])
        _say("")
    finally:
        lm.close(row)


def captured_error(lm: ModelRunner) -> float:
    """How much the logits of two small trees differ from those of an eager pass: the median over their nodes, in
    standard deviations of the logits. NaN logits, which the step reports, do not count."""
    rows = [object(), object()]
    texts = [tokens_to_try(lm.model, 6 + 3 * i, 11 * i) for i, _ in enumerate(rows)]
    entries = [Entries(tokens_to_try(lm.model, len(tree), 5), list(tree)) for tree in TREES]
    for row in rows:
        lm.open(row, 32)
    found: list[torch.Tensor] = []
    captured = lm.captured
    try:
        for passes in (None, captured):
            lm.captured = passes
            if not found:
                lm.prefill(rows, texts)
            found.append(lm.forward(rows, entries).logits_NV)
            lm.drop(rows)
    finally:
        lm.captured = captured
        for row in rows:
            lm.close(row)
    errors = [difference(ours_V, eager_V) for eager_V, ours_V in zip(*found)]
    return statistics.median([error for error in errors if error == error] or [0.0])


def _say(line: str) -> None:
    """A line of progress, which the next one replaces; only on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
