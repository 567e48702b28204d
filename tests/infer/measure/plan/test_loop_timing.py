"""The loop timed with simulated drafts, and the time outside the passes."""

from __future__ import annotations

import pytest

from draftsmith.infer.contract.trace import StepTrace
from draftsmith.infer.drafters import SmallLM
from draftsmith.infer.drafters.simulated import SimulatedDrafter
from draftsmith.infer.measure.plan.loop_timing import LoopTiming, Overhead, loop_timing, overhead, time_loop
from draftsmith.infer.models.hf_target import HFTarget


@pytest.fixture
def target(make_model):
    return HFTarget(make_model("llama"))


def chain(model, length):
    return SmallLM(model, num_draft_tokens=length, top_k=1, min_confidence=0.0)


def test_accepted_lengths_are_those_of_simulated_drafts_and_plain_is_one(target, make_model):
    drafters = {str(n): SimulatedDrafter(chain(make_model("llama", seed=9), n)) for n in (2, 11)}
    found = time_loop(target, drafters, rows=3, context=10, new_tokens=37)
    assert found["plain"].accepted_length == 1.0
    assert found["plain"].speedup == 1.0
    assert found["2"].accepted_length == pytest.approx(37 / 13)
    assert found["11"].accepted_length == pytest.approx(37 / 4)
    assert found["11"].step_s > found["2"].step_s > found["plain"].step_s  # by 4 and 3 times: noise is smaller
    assert all(0 < one.outside_s < one.step_s for one in found.values())


def steps(count, batch, seconds, nodes=0, committed=1):
    half = seconds / 2
    return [
        StepTrace("r", i, batch, 9, nodes, nodes, nodes, committed - 1, committed, score_s=seconds,
                  target_forward_s=half, draft_forward_s=half / 2)
        for i in range(count)
    ]  # fmt: skip


def test_only_steps_of_the_whole_batch_count():
    """Two rows: 3 tokens in 2 s a step, against 1 in 1 s. What the row that stays behind does is another batch size."""
    plain = steps(8, 2, 1.0) + steps(50, 1, 0.1)
    found = loop_timing(steps(6, 2, 2.0, nodes=4, committed=3) + steps(50, 1, 9.0, nodes=4), plain, rows=2)
    assert found == LoopTiming(accepted_length=3.0, step_s=2.0, outside_s=0.5, speedup=1.5)


def test_cut_drafts_count_for_the_speed_and_not_for_the_step():
    found = loop_timing(steps(3, 1, 2.0, nodes=4, committed=3) + steps(1, 1, 1.0, nodes=1), steps(9, 1, 1.0), rows=1)
    assert found.step_s == 2.0
    assert found.speedup == pytest.approx(10 / 7)


def test_overhead_is_split_between_steps_rows_and_passes():
    truth = Overhead(3e-4, 2e-5, 1e-4, 1e-5)
    points = [(rows, passes, truth(rows, passes)) for rows in (1, 8) for passes in (0, 2, 8)]
    found = Overhead.fit(points)
    assert [found(r, n) for r, n, _ in points] == pytest.approx([s for _, _, s in points])
    assert found(4, 5) == pytest.approx(truth(4, 5))


def test_overhead_below_zero_is_noise():
    found = Overhead.fit([(1, 0, -1e-4), (1, 4, 2e-4), (8, 0, -2e-4), (8, 4, 3e-4)])
    assert min(found.step, found.row, found.draft_pass, found.draft_pass_row) >= 0


def test_what_the_costs_hold_already_is_not_counted_twice(target, make_model):
    def measured(around):
        return overhead(
            target,
            lambda length: chain(make_model("llama", seed=9), length),
            lambda rows, length: around,
            batch_sizes=[1, 2],
            lengths=[2, 6],
            context=8,
            new_tokens=12,
        )

    assert measured(0.0)(1, 4) > 0
    assert measured(10.0)(1, 4) == 0.0
