"""Predicted speedup: the formula against numbers worked out by hand."""

import pytest

from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.measure.predicted import largest, largest_that_pays, measured_rows, predict

# One token 10 s, 4 tokens 12 s, 8 tokens 16 s, then 1 s a token; each token of context seen costs 0.01 s a row.
COSTS = Costs({"target": PassCost([1, 4, 8], [10.0, 12.0, 16.0], per_seen=0.01)}, overhead=0.5)


def test_speedup_and_break_even_are_those_of_the_formula():
    """3 nodes: 4 tokens a pass, 12 s; with 1.5 s of drafting and 0.5 s of overhead a step takes 14 s against 10."""
    found = predict(COSTS, 1, accepted_length=2.1, nodes=3, draft_s=1.5)
    assert found.plain_s == 10.0
    assert found.step_s == pytest.approx(14.0)
    assert found.break_even == pytest.approx(1.4)
    assert found.speedup == pytest.approx(2.1 * 10 / 14)
    assert found.pays


def test_a_batch_pays_for_every_row_and_for_its_context():
    """Two rows of 4 tokens: 16 s, against 2 tokens plain: 10.67 s; 100 tokens of context add 2 s to both."""
    found = predict(COSTS, 2, accepted_length=2.0, nodes=3, draft_s=3.0, context=100)
    plain = 10 + 2 / 3 + 2
    assert found.plain_s == pytest.approx(plain)
    assert found.step_s == pytest.approx(3 + 16 + 2 + 0.5)
    assert found.speedup == pytest.approx(2 * plain / 21.5)


def test_speedup_is_one_at_break_even():
    even = predict(COSTS, 2, accepted_length=1.0, nodes=3, draft_s=3.0).break_even
    assert predict(COSTS, 2, accepted_length=even, nodes=3, draft_s=3.0).speedup == pytest.approx(1.0)


def test_trees_of_several_sizes_cost_their_mean_alone_and_the_largest_in_a_batch():
    """Half of the steps have no draft (10 s), half 3 nodes (12 s): 11 s alone. Of two rows a quarter has none."""
    alone = predict(COSTS, 1, accepted_length=1.5, nodes=[0, 3], draft_s=0.0)
    assert alone.step_s == pytest.approx(11.0 + 0.5)
    both = predict(COSTS, 2, accepted_length=1.5, nodes=[0, 3], draft_s=0.0)
    assert both.step_s == pytest.approx(0.25 * (10 + 2 / 3) + 0.75 * 16 + 0.5)


def test_the_largest_of_some_draws_has_the_shares_of_its_order_statistic():
    assert largest([5, 1, 5, 3], 1) == [(1, 0.25), (3, 0.25), (5, 0.5)]
    assert largest([5, 1, 5, 3], 2) == [(1, 1 / 16), (3, 3 / 16), (5, 12 / 16)]
    assert sum(share for _, share in largest(list(range(9)), 32)) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no step"):
        largest([], 1)


def test_where_it_pays_no_more_is_the_first_batch_size_that_loses():
    """B rows of 3 nodes cost 4 B + 8 s from B = 2 on; plain decoding (B from 4 on) costs B + 8: it loses soon."""
    at = {b: predict(COSTS, b, accepted_length=2.0, nodes=3, draft_s=0.0) for b in range(1, 40)}
    assert [at[b].pays for b in (1, 2, 3, 4)] == [True, True, True, False]
    assert largest_that_pays(at.__getitem__, 32) == 3
    never = lambda b: predict(COSTS, b, accepted_length=1.0, nodes=3, draft_s=0.0)  # noqa: E731
    assert largest_that_pays(never, 32) == 0
    always = lambda b: predict(COSTS, b, accepted_length=9.0, nodes=3, draft_s=0.0)  # noqa: E731
    assert largest_that_pays(always, 32) == 32


def test_what_lies_beyond_the_measured_passes_is_known():
    assert measured_rows(COSTS, 3) == 2
    assert measured_rows(COSTS, 63) == 0


def test_a_batch_of_no_rows_is_refused():
    with pytest.raises(ValueError, match="at least 1, not 0"):
        predict(COSTS, 0, accepted_length=1.0, nodes=1, draft_s=0.0)
