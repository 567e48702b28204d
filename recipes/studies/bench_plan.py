"""`draftsmith plan bench`: is what `plan` predicts what the loop then does? Predicted beside measured speedups.

The shapes and lengths of the pairs are none that the survey measures: their costs are estimated from other shapes and
read between other numbers of tokens. Drafts have random weights, run every pass and are told their tokens, so that any
acceptance can be set, and only the latencies are on trial.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from json import dumps
from typing import Any

# In layers and in parts of the target's width: measured, and tried with so many tokens.
MEASURED = ((1, 1.0), (2, 1.0), (5, 1.0), (1, 0.5), (4, 0.5))
TRIED = (((3, 1.0), 3), ((4, 1.0), 7), ((2, 0.5), 5), ((3, 0.5), 10), ((2, 0.75), 5))
LENGTHS = (1, 2, 4, 8, 12)
WITHIN = 0.15


def bench_plan(
    *,
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

    Example: draftsmith plan bench --target MODEL --batch_sizes 1 8

    Args:
        target: folder, Hub name, or a config.json: only the config is read.
        pairs: SHAPE@LENGTH, comma-separated; by default five, between the shapes that are measured.
        shapes: that are measured instead of the default ones.
        batch_sizes: rows decoded together.
        context: tokens of the prompts.
        max_new_tokens: of each answer.
        acceptance: the share of drafted tokens that are right.
        repeats: how often every pair and plain decoding are timed.
        dtype: of the weights; auto is the config's.
        device: auto is CUDA where there is one.
        seconds: that timing the passes may take.
        json: print one JSON object on the last line.
    """
    from draftsmith.infer.measure import tables
    from draftsmith.infer.measure.plan.shapes import choose_device, choose_dtype, load_config, parse_shapes
    from draftsmith.infer.measure.plan.survey import SurveyRequest, survey
    from draftsmith.infer.measure.plan.tables import check_table
    from draftsmith.recipes.commands.plan import numbers, words
    from draftsmith.recipes.studies.plan_check import check, within

    config = load_config(target)
    kind, where = choose_dtype(config, dtype), choose_device(device)
    measured = parse_shapes(words(shapes) or _shapes(config, MEASURED), config)
    tried = [_pair(word) for word in words(pairs) or _pairs(config)]
    wanted = parse_shapes([shape for shape, _ in tried], config)
    sizes = numbers("batch_sizes", batch_sizes)
    asked = SurveyRequest(
        sizes,
        (max(1, context // 2), 2 * context),
        LENGTHS,
        measured,
        [shape for shape in wanted if shape not in measured],
    )
    found = survey(config, kind, where, asked, seconds=seconds, progress=_progress)
    rows: list[dict[str, Any]] = []
    for size in sizes:
        _progress(f"the loop at batch size {size}")
        rows += check(
            config,
            kind,
            where,
            found,
            [(str(shape), length) for shape, length in tried],
            rows=size,
            context=context,
            new_tokens=max_new_tokens,
            acceptance=acceptance,
            rounds=repeats,
        )
    good = within(rows, WITHIN)
    if json:
        print(dumps({"machine": found.machine, "pairs": rows, "within": good, "total": len(rows), "limit": WITHIN}))
    else:
        tables.show([check_table(rows)])
        print(f"{good} of {len(rows)} predictions within {WITHIN:.0%} of what was measured")
    return 0 if good >= 0.8 * len(rows) else 1


def _shapes(config: Any, parts: Any) -> list[str]:
    width = int(config.get_text_config().hidden_size)
    return [f"{layers}x{int(width * share)}" for layers, share in parts]


def _pairs(config: Any) -> list[str]:
    width = int(config.get_text_config().hidden_size)
    return [f"{part[0]}x{int(width * part[-1])}@{length}" for part, length in TRIED]


def _pair(word: str) -> tuple[str, int]:
    shape, _, length = word.partition("@")
    if not length.isdecimal() or int(length) < 1:
        raise ValueError(f"{word!r} is no pair: SHAPE@LENGTH, such as 3x512@4")
    return shape, int(length)


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
