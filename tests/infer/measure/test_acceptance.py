"""Curves of acceptance: what is said, what was measured, and the length that they promise."""

import json

import pytest

from draftsmith.infer.measure.acceptance import expected_length, parse


def test_the_promised_length_is_the_sum_of_the_chances_to_reach_each_depth():
    assert expected_length((0.5,), 3) == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    assert expected_length((0.8, 0.5), 3) == pytest.approx(1 + 0.8 + 0.8 * 0.5 + 0.8 * 0.5 * 0.5)
    assert [expected_length((1.0,), 4), expected_length((0.0,), 4), expected_length((0.9,), 0)] == [5.0, 1.0, 1.0]


def test_shares_are_read_as_they_are_written():
    assert parse("0.7") == (0.7,)
    assert parse("0.8, 0.7,0.6") == (0.8, 0.7, 0.6)


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
    assert parse(results({"small": CHAIN})) == (0.8, 0.5)
    assert parse(results({"small": CHAIN}, before="1/8 runs\n")) == (0.8, 0.5)


def test_a_tree_s_curve_is_the_share_of_the_steps_that_got_on(results):
    assert parse(results({"small": TREE}), trees=True) == (0.8, 0.5)


def test_a_tree_is_not_taken_for_a_chain(results):
    with pytest.raises(ValueError, match="--tree_acceptance"):
        parse(results({"small": TREE}))


def test_one_of_several_drafters_is_named(results):
    path = results({"a": CHAIN, "b": {**CHAIN, "by_depth": [depth(1, 10, 9)]}})
    assert parse(f"{path}:b") == (0.9,)
    with pytest.raises(ValueError, match=r"figures by depth of a, b: name one drafter, as .*:NAME"):
        parse(path)
    with pytest.raises(ValueError, match="'c'; it has them of a, b"):
        parse(f"{path}:c")


@pytest.mark.parametrize("text", ["1.2", "-0.1", "0.5,1.5", "nan"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(ValueError, match="from 0 to 1"):
        parse(text)


@pytest.mark.parametrize("content", ["", "hello", "[1]", '{"drafters": 3}', "{}"])
def test_a_file_without_results_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match="no results of bench or replay"):
        parse(str(tmp_path / "x.json"))


@pytest.mark.parametrize("text", ["nowhere.json", "0.7;0.6", "nowhere.json:a"])
def test_neither_number_nor_file(text):
    with pytest.raises(ValueError, match="neither a share"):
        parse(text)
