"""Rows decoded with a drafter, and the proof that its drafts were tried. Not tests themselves."""

from __future__ import annotations

from collections.abc import Sequence

from draftsmith.infer.contract.protocols import Drafter, Target
from draftsmith.infer.contract.row import Row
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.rules.named import DEFAULT


def decode(
    target: Target, drafter: Drafter, rows: Sequence[Row], batch_size: int = 1, rule: str = DEFAULT
) -> list[Generation]:
    drafter.bind(target)
    return generate(target, drafter, rows, batch_size=batch_size, rule=rule)


def tokens(generations: Sequence[Generation]) -> list[list[int]]:
    return [generation.token_ids for generation in generations]


def accepted_length(generations: Sequence[Generation]) -> float:
    traces = [trace for generation in generations for trace in generation.traces]
    return sum(trace.committed for trace in traces) / len(traces)


def assert_tried_hard(generations: Sequence[Generation], deep: int = 2) -> None:
    """Some drafts were accepted deep, some rejected, and the texts vary."""
    traces = [trace for generation in generations for trace in generation.traces]
    assert max(trace.accepted for trace in traces) >= deep
    assert any(not tried.accepted for trace in traces for tried in trace.tried)
    assert len({token for generation in generations for token in generation.token_ids}) >= 8
