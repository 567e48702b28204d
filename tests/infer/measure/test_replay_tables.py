"""A replay's tables: what a reader is told beside the numbers."""

from __future__ import annotations

import pytest

from draftsmith.infer.measure.replay_tables import predicted_notes


def told(nodes_per_step: float, off_above: int | None) -> str:
    by_size = [{"batch_size": 1, "speedup": 1.0, "break_even": 2.0}]
    found = {"off_above": off_above, "measured_up_to": 1, "by_batch_size": by_size}
    return "\n".join(predicted_notes({"drafters": {"rest": {"nodes_per_step": nodes_per_step, "predicted": found}}}))


def test_a_large_draft_that_pays_nowhere_is_told_to_try_fewer_nodes():
    assert "rest: 59 nodes a step do not pay here" in told(58.8, 0)
    assert "[nodes=8]" in told(58.8, 0)


@pytest.mark.parametrize(("nodes", "off_above"), [(7.2, 0), (58.8, 1), (58.8, None)])
def test_small_drafts_and_drafts_that_pay_somewhere_are_not(nodes, off_above):
    assert "nodes=" not in told(nodes, off_above)
