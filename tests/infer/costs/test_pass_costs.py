"""Costs of passes: between and beyond the measured points, to a file and back, and refused files."""

import json
from dataclasses import replace

import numpy as np
import pytest

from draftsmith.infer.costs.identity import TargetIdentity
from draftsmith.infer.costs.pass_costs import Costs, PassCost

TARGET = TargetIdentity("vicuna", "c0", 7_000_000_000, 32000)
COST = PassCost([1, 4, 16], [1.0, 2.0, 8.0], per_seen=0.01, per_pair=0.001)


def test_cost_is_linear_between_points_and_keeps_the_last_slope():
    assert [COST(tokens) for tokens in (0, 1, 4, 10, 16, 32)] == [1.0, 1.0, 2.0, 5.0, 8.0, 16.0]


def test_rows_multiply_tokens_and_context():
    assert COST.even(2, 2, 0) == COST.even(1, 4, 0) == COST(4)
    assert COST.even(2, 2, 10) == pytest.approx(2.0 + 0.01 * 20 + 0.001 * 40)
    assert replace(COST, per_row=0.1).even(2, 2, 10) == pytest.approx(COST.even(2, 2, 10) + 0.2)


def test_a_padded_pass_costs_what_its_bucket_costs():
    cost = PassCost([1, 4, 16], [1.0, 2.0, 8.0], per_pair=0.001, buckets=(16,))
    assert cost.even(8, 1, 0) == cost.even(8, 2, 0) == cost(3) == 8.0
    assert cost.even(8, 2, 10) == pytest.approx(8.0 + 0.001 * 16 * 10)
    assert cost.even(8, 3, 0) > cost.even(8, 2, 0)


def test_rows_of_a_pass_may_have_different_numbers_of_tokens_and_none_is_padded_to_the_longest():
    longest = 9
    assert COST(longest + 3) == pytest.approx(6.0)
    assert COST(longest + 3) < COST.even(4, longest, 0)
    assert COST(10, 300, 9 * 100 + 1 * 200) == pytest.approx(5.0 + 0.01 * 300 + 0.001 * 1100)


def test_many_passes_cost_what_each_of_them_does():
    tokens, pairs = np.arange(0, 40), np.arange(0, 400, 10)
    for cost in (COST, PassCost([1, 4, 16], [1.0, 2.0, 8.0], buckets=(4, 8)), PassCost([3], [2.0], per_row=0.5)):
        each = [cost(int(one), 50, float(pair), 3) for one, pair in zip(tokens, pairs)]
        assert cost.many(tokens, 50, pairs, 3).tolist() == pytest.approx(each)


def test_costs_come_back_from_a_file(tmp_path):
    costs = Costs({"target": COST}, overhead=0.5, machine={"name": "x"}, target=TARGET)
    (tmp_path / "costs.json").write_text(json.dumps(costs.to_json()))
    found = Costs.load(tmp_path / "costs.json")
    assert found.of("target").even(2, 5, 7) == COST.even(2, 5, 7)
    assert found.target == TARGET
    assert found.describe() == "vicuna on x, unknown dtype"


def test_a_file_without_a_target_is_refused_with_the_command_that_writes_a_new_one(tmp_path):
    path = tmp_path / "costs.json"
    old = Costs({"target": COST}).to_json()
    for value in (old, {key: one for key, one in old.items() if key != "target"} | {"format": 1}):
        path.write_text(json.dumps(value))
        with pytest.raises(ValueError, match="run `draftsmith plan` or `draftsmith calibrate` again"):
            Costs.load(path)


@pytest.mark.parametrize("text", ["", "[]", '{"kind": "costs", "format": 99}', '{"kind": "costs", "format": 1}'])
def test_another_file_is_refused_with_one_line(tmp_path, text):
    (tmp_path / "costs.json").write_text(text)
    with pytest.raises(ValueError, match=r"costs\.json"):
        Costs.load(tmp_path / "costs.json")


def test_an_unmeasured_pass_is_an_error():
    with pytest.raises(ValueError, match="no costs of 'sd2:1'"):
        Costs({"target": COST}).of("sd2:1")


@pytest.mark.parametrize("buckets", [(), (1, 4, 16)])
def test_a_row_s_part_of_a_shared_pass_is_the_pass_divided_by_its_rows(buckets: tuple[int, ...]) -> None:
    whole = PassCost((1, 4, 16), (1.0, 1.3, 4.0), per_seen=1e-3, per_pair=1e-4, buckets=buckets)
    costs = Costs({"target": whole}, overhead=0.4).shared(3)
    for tokens in (1, 2, 5, 9):
        seconds = whole(3 * tokens, 3 * 50, 3 * tokens * 50) / 3
        assert costs.of("target")(tokens, 50, tokens * 50) == pytest.approx(seconds)
    assert costs.overhead == pytest.approx(0.4 / 3)
