"""Predicted speedup against numbers worked out by hand, and acceptance by depth as given or measured."""

import json
from math import comb

import pytest

from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.measure.predicted import (
    expected_length,
    largest_that_pays,
    measured_rows,
    parse_acceptance,
    predict,
    total_shares,
)

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


def test_trees_of_several_sizes_cost_their_mean_alone_and_their_totals_in_a_batch():
    """Half of the steps have no draft (10 s), half 3 nodes (12 s): 11 s alone. Two rows have 0, 3 or 6 nodes."""
    alone = predict(COSTS, 1, accepted_length=1.5, nodes=[0, 3], draft_s=0.0)
    assert alone.step_s == pytest.approx(11.0 + 0.5)
    both = predict(COSTS, 2, accepted_length=1.5, nodes=[0, 3], draft_s=0.0)
    assert both.step_s == pytest.approx(0.25 * (10 + 2 / 3) + 0.5 * 13 + 0.25 * 16 + 0.5)


def test_a_tree_costs_its_own_nodes_only_beside_rows_without_one():
    """Four rows of which one in four has 8 nodes: never 4 x 9 tokens unless all of them have."""
    bent = Costs({"target": PassCost([1, 12, 36], [1.0, 12.0, 60.0])})
    found = predict(bent, 4, accepted_length=1.0, nodes=[0, 0, 0, 8], draft_s=0.0)
    seconds = {0: 4.0, 8: 12.0, 16: 28.0, 24: 44.0, 32: 60.0}
    shares = [comb(4, k) * 0.25**k * 0.75 ** (4 - k) for k in range(5)]
    assert found.step_s == pytest.approx(sum(share * s for share, s in zip(shares, seconds.values())))


def test_totals_have_the_shares_of_independent_draws():
    assert total_shares([2, 0, 2, 1], 1).tolist() == [0.25, 0.25, 0.5]
    assert total_shares([2, 0, 2, 1], 2).tolist() == [1 / 16, 2 / 16, 5 / 16, 4 / 16, 4 / 16]
    shares_N = total_shares(list(range(9)), 32)
    assert shares_N.sum() == pytest.approx(1.0)
    assert sum(total * share for total, share in enumerate(shares_N)) == pytest.approx(32 * 4)
    with pytest.raises(ValueError, match="no step"):
        total_shares([], 1)


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


def test_the_promised_length_is_the_sum_of_the_chances_to_reach_each_depth():
    assert expected_length((0.5,), 3) == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    assert expected_length((0.8, 0.5), 3) == pytest.approx(1 + 0.8 + 0.8 * 0.5 + 0.8 * 0.5 * 0.5)
    assert [expected_length((1.0,), 4), expected_length((0.0,), 4), expected_length((0.9,), 0)] == [5.0, 1.0, 1.0]


def test_shares_are_read_as_they_are_written():
    assert parse_acceptance("0.7") == (0.7,)
    assert parse_acceptance("0.8, 0.7,0.6") == (0.8, 0.7, 0.6)


def depth(number, reached, accepted):
    return {"depth": number, "reached": reached, "accepted": accepted, "share": accepted / reached}


CHAIN = {"steps": 100, "by_depth": [depth(1, 90, 72), depth(2, 72, 36)]}
TREE = {"steps": 100, "by_depth": [depth(1, 250, 80), depth(2, 160, 40)]}


@pytest.fixture
def results(tmp_path):
    def write(drafters, before=""):
        path = tmp_path / "bench.json"
        path.write_text(before + json.dumps({"drafters": {"plain": {"steps": 9, "by_depth": []}} | drafters}) + "\n")
        return str(path)

    return write


def test_a_chain_s_curve_is_the_share_of_the_tokens_that_were_reached(results):
    """10 of the 100 steps had no draft: they say nothing about its tokens."""
    assert parse_acceptance(results({"small": CHAIN})) == (0.8, 0.5)
    assert parse_acceptance(results({"small": CHAIN}, before="1/8 runs\n")) == (0.8, 0.5)


def test_a_tree_s_curve_is_the_share_of_the_steps_that_got_on(results):
    assert parse_acceptance(results({"small": TREE}), trees=True) == (0.8, 0.5)


def test_a_tree_is_not_taken_for_a_chain(results):
    with pytest.raises(ValueError, match="--tree_acceptance"):
        parse_acceptance(results({"small": TREE}))


def test_a_curve_of_drafts_that_were_verified_as_a_whole_is_refused(results):
    """It holds for drafts of that shape only."""
    assert parse_acceptance(results({"small": {**CHAIN, "verified_jointly": 0.0}})) == (0.8, 0.5)
    with pytest.raises(ValueError, match="--rule token"):
        parse_acceptance(results({"small": {**CHAIN, "verified_jointly": 0.5}}))


def test_one_of_several_drafters_is_named(results):
    path = results({"a": CHAIN, "b": {**CHAIN, "by_depth": [depth(1, 10, 9)]}})
    assert parse_acceptance(f"{path}:b") == (0.9,)
    with pytest.raises(ValueError, match=r"figures by depth of a, b: name one drafter, as .*:NAME"):
        parse_acceptance(path)
    with pytest.raises(ValueError, match="'c'; it has them of a, b"):
        parse_acceptance(f"{path}:c")


@pytest.mark.parametrize("text", ["1.2", "-0.1", "0.5,1.5", "nan"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(ValueError, match="from 0 to 1"):
        parse_acceptance(text)


@pytest.mark.parametrize("content", ["", "hello", "[1]", '{"drafters": 3}', "{}"])
def test_a_file_without_results_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match="no results of bench or replay"):
        parse_acceptance(str(tmp_path / "x.json"))


@pytest.mark.parametrize("text", ["nowhere.json", "0.7;0.6", "nowhere.json:a"])
def test_neither_number_nor_file(text):
    with pytest.raises(ValueError, match="neither a share"):
        parse_acceptance(text)
