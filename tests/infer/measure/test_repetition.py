"""A looping answer is told from one that goes on."""

import pytest

from draftsmith.infer.measure.repetition import distinct_share


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
