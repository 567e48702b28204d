"""Times of proposing and the truth of confidences, against traces counted by hand."""

import pytest

from draftsmith.infer.contract.trace import StepTrace, Tried
from draftsmith.infer.measure.proposing import propose_figures


def trace(propose_s, *tried):
    return StepTrace("r", 0, 1, 10, 4, 4, 1, 0, 1, tried=[Tried(1, "x", said, came) for said, came in tried],
                     propose_s=propose_s)  # fmt: skip


def test_confidences_are_compared_with_what_came_by_tenths():
    traces = [trace(0.001, (0.25, True), (0.95, True)), trace(0.003, (0.21, False), (1.0, False))]
    found = propose_figures(traces)
    assert found["propose_ms_p50"] == pytest.approx(2.0)
    assert found["propose_ms_p99"] == pytest.approx(2.98)
    low, high = found["reliability"]
    assert (low["said"], low["came"], low["tried"]) == (pytest.approx(0.23), 0.5, 2)
    assert (high["said"], high["came"], high["tried"]) == (pytest.approx(0.975), 0.5, 2)


def test_nothing_drafted_is_nothing_said():
    assert propose_figures([trace(0.0)])["reliability"] == []
    assert propose_figures([]) == {"propose_ms_p50": 0.0, "propose_ms_p99": 0.0, "reliability": []}
