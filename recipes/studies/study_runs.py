"""What studies of training share: which runs are finished, the held-out prompts, and the target's own answers to them.

What is trained and how it is measured is the study's (learning.py, distil_study.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.measure.metrics import distinct_share
from draftsmith.infer.text.records import read_records
from draftsmith.infer.text.templates import Template
from draftsmith.train.run.validation import ROWS_AT_ONCE, decode_greedily

if TYPE_CHECKING:
    from draftsmith.infer.models.hf_target import HFTarget


def finished(folder: Path) -> bool:
    """Whether a training run stands there and has come to its end."""
    run = folder / "run.json"
    return run.is_file() and json.loads(run.read_text(encoding="utf-8")).get("state") == "finished"


def measured_path(out: Path, name: str, seed: int) -> Path:
    return out / "measured" / f"{name}-{seed}.json"


def first_turns(questions: list[str], template: Template) -> list[list[int]]:
    """The first turn of every question, as it is served."""
    return [template.prompt_ids(record.prompt) for record in read_records(questions, need="questions")]


def plain_answers(
    target: HFTarget, prompts: Sequence[Sequence[int]], max_new_tokens: int, rows_at_once: int = ROWS_AT_ONCE
) -> dict[str, Any]:
    """How much of the target's own greedy answers is no repetition, prompt by prompt."""
    answers = decode_greedily(target, Empty(), prompts, max_new_tokens, rows_at_once)
    return {"distinct": [distinct_share([answer.token_ids]) for answer in answers]}
