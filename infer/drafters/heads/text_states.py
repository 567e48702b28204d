"""The target's states along a text that is there already, for heads whose drafts are forecast and not decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from draftsmith.infer.contract.protocols import Feedback, Target
from draftsmith.infer.contract.row import Row
from draftsmith.infer.models.runner.model_runner import PREFILL_CHUNK


def text_states(target: Target | None, ids: Sequence[int], features: Sequence[str]) -> Iterator[Feedback]:
    """What the target gives of all positions but the last, chunk by chunk."""
    assert target is not None, "bind the drafter first"
    row = Row("text", list(ids))
    target.admit([row], features)
    try:
        while target.unread(row):
            yield from target.prefill([row], PREFILL_CHUNK)
    finally:
        target.release([row])
