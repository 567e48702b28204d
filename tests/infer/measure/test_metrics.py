"""Every number of metrics.py against a hand-computed value."""

import pytest

from draftsmith.infer.contract.trace import StepTrace, Tried
from draftsmith.infer.measure.metrics import (
    Totals,
    break_even,
    by_depth,
    by_exit,
    by_source,
    distinct_share,
    propose_figures,
    ratio,
    step_quantile,
    trace_figures,
)


@pytest.fixture
def three_steps(trace):
    """A hit of 4 nodes with 2 accepted, a hit of 2 nodes with none, an empty draft; 2.0, 1.0 and 0.5 seconds."""
    first = trace(
        committed=3,
        nodes=4,
        seconds=2.0,
        target=1.0,
        draft=0.5,
        tried=[(1, "pld", False), (1, "small", True), (2, "small", True), (3, "small", False)],
    )
    second = trace(committed=1, nodes=2, seconds=1.0, step=1, target=0.8, tried=[(1, "pld", False)])
    third = trace(committed=1, nodes=0, seconds=0.5, step=2, target=0.4)
    first.nodes_by_source = {"pld": 1, "small": 3}
    second.nodes_by_source = {"pld": 2}
    first.exits = [(1, 6), (2, 9), (3, 6)]
    return [first, second, third]


def test_each_metric_is_its_definition(three_steps):
    totals = Totals.of(three_steps)
    assert totals.accepted_length == pytest.approx(5 / 3)
    assert totals.acceptance_rate == pytest.approx(2 / 6)
    assert totals.hit_rate == pytest.approx(2 / 3)
    assert totals.nodes_per_step == 2.0
    assert totals.tokens_per_s == pytest.approx(5 / 3.5)
    assert totals.step_s == pytest.approx(3.5 / 3)
    assert totals.overhead == pytest.approx(1 - (2.2 + 0.5) / 3.5)


def test_time_shares_add_up_to_one(three_steps):
    shares = Totals.of(three_steps).time_shares
    assert shares["target"] == pytest.approx(2.2 / 3.5)
    assert shares["draft"] == pytest.approx(0.5 / 3.5)
    assert sum(shares.values()) == pytest.approx(1)


def test_acceptance_rate_is_a_ratio_of_sums_and_no_mean_of_ratios(trace):
    steps = [trace(committed=2, nodes=1), trace(committed=1, nodes=9)]
    assert Totals.of(steps).acceptance_rate == pytest.approx(1 / 10)


def test_depth_counts_candidates_reached_and_not_those_proposed(three_steps):
    rows = by_depth(three_steps)
    assert [(row["depth"], row["reached"], row["accepted"]) for row in rows] == [(1, 3, 1), (2, 1, 1), (3, 1, 0)]
    assert rows[0]["share"] == pytest.approx(1 / 3)
    assert rows[0]["by_source"]["pld"] == {"reached": 2, "accepted": 0, "share": 0.0}
    assert rows[0]["by_source"]["small"] == {"reached": 1, "accepted": 1, "share": 1.0}


def test_credit_by_source(three_steps):
    found = by_source(three_steps)
    assert found["pld"] == {"nodes": 3, "reached": 2, "accepted": 0, "share": 0.0, "acceptance_rate": 0.0}
    assert found["small"]["acceptance_rate"] == pytest.approx(2 / 3)


def test_what_another_source_is_credited_with_counts_apart(trace):
    step = trace(committed=2, nodes=1, tried=[(1, "pld", True)])
    step.nodes_by_source, step.also_named = {"pld": 1}, {"small": 1}
    found = by_source([step])
    assert "also_named" not in found["pld"]
    assert (found["small"]["also_named"], found["small"]["nodes"]) == (1, 0)


def test_exits_are_counted_by_layer(three_steps):
    assert by_exit(three_steps) == {"6": 2, "9": 1}


def test_rows_of_one_step_share_its_seconds(trace):
    """Two rows, one step of 2 seconds: 5 tokens in 2 seconds and not in 4; but two row-steps for accepted_length."""
    rows = [trace(committed=2, seconds=2.0, batch=2, row="a"), trace(committed=3, seconds=2.0, batch=2, row="b")]
    totals = Totals.of(rows)
    assert totals.tokens_per_s == pytest.approx(2.5)
    assert totals.accepted_length == pytest.approx(2.5)
    assert totals.step_s == pytest.approx(2.0)


def test_step_quantiles_count_a_shared_step_once(trace):
    """Steps of 1, 2, 3 and 10 seconds; the last is shared by 8 rows, which must not make it the median."""
    steps = [trace(seconds=seconds, step=i) for i, seconds in enumerate([1.0, 2.0, 3.0])]
    steps += [trace(seconds=10.0, step=3, batch=8, row=str(row)) for row in range(8)]
    assert step_quantile(steps, 0.50) == 2.0
    assert step_quantile(steps, 0.75) == 3.0
    assert step_quantile(steps, 0.95) == 10.0


def test_nearest_rank_of_one_to_a_hundred(trace):
    steps = [trace(seconds=float(seconds)) for seconds in range(100, 0, -1)]
    assert step_quantile(steps, 0.50) == 50.0
    assert step_quantile(steps, 0.95) == 95.0


def test_speedup_is_accepted_length_over_break_even(trace):
    """A step with the drafter costs 1.5 s, a plain token 1.2 s: 1.25 tokens a step are needed to break even."""
    drafter = Totals.of([trace(committed=3, seconds=1.0), trace(committed=2, seconds=2.0)])
    plain = Totals.of([trace(committed=1, seconds=1.2, step=i) for i in range(5)])
    needed = break_even(drafter, plain)
    assert needed == pytest.approx(1.25)
    speedup = drafter.tokens_per_s / plain.tokens_per_s
    assert drafter.accepted_length / needed == pytest.approx(speedup)


def test_totals_of_parts_add_up_to_totals_of_all(three_steps):
    assert Totals.of(three_steps[:1]) + Totals.of(three_steps[1:]) == Totals.of(three_steps)


def test_what_cannot_be_known_is_none(trace):
    empty = trace_figures([])
    for key in ("tokens_per_s", "accepted_length", "acceptance_rate", "hit_rate", "overhead", "p95_step_s"):
        assert empty[key] is None
    assert Totals.of([trace(nodes=0)]).acceptance_rate is None
    assert break_even(Totals(), Totals.of([trace()])) is None
    assert ratio(1, 0) is None


def proposed(propose_s, *tried):
    return StepTrace("r", 0, 1, 10, 4, 4, 1, 0, 1, tried=[Tried(1, "x", said, came) for said, came in tried],
                     propose_s=propose_s)  # fmt: skip


def test_confidences_are_compared_with_what_came_by_tenths():
    traces = [proposed(0.001, (0.25, True), (0.95, True)), proposed(0.003, (0.21, False), (1.0, False))]
    found = propose_figures(traces)
    assert found["propose_ms_p50"] == pytest.approx(2.0)
    assert found["propose_ms_p99"] == pytest.approx(2.98)
    low, high = found["reliability"]
    assert (low["said"], low["came"], low["tried"]) == (pytest.approx(0.23), 0.5, 2)
    assert (high["said"], high["came"], high["tried"]) == (pytest.approx(0.975), 0.5, 2)


def test_steps_verified_jointly_say_nothing_about_confidences():
    alone, jointly = proposed(0.001, (0.25, True)), proposed(0.001, (0.25, False), (0.95, True))
    jointly.jointly = True
    assert propose_figures([alone, jointly])["reliability"] == propose_figures([alone])["reliability"]
    assert trace_figures([alone, jointly])["verified_jointly"] == 0.5
    assert StepTrace.from_json(jointly.to_json()).jointly


def test_nothing_drafted_is_nothing_said():
    assert propose_figures([proposed(0.0)])["reliability"] == []
    assert propose_figures([]) == {"propose_ms_p50": 0.0, "propose_ms_p99": 0.0, "reliability": []}


def test_nothing_repeats():
    assert distinct_share([list(range(20))]) == 1.0


def test_a_loop_of_two_tokens_has_two_distinct_grams():
    assert distinct_share([[1, 2] * 10]) == pytest.approx(2 / 17)


def test_a_turn_that_repeats_the_turn_before_counts_as_repetition():
    assert distinct_share([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]) == 0.5


def test_grams_do_not_reach_across_turns():
    assert distinct_share([[1, 2, 3], [4, 5, 6]]) == 1.0


def test_short_answers_repeat_nothing():
    assert distinct_share([[1, 1, 1]]) == 1.0
    assert distinct_share([]) == 1.0
