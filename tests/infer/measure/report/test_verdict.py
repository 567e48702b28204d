"""The verdict: what it recommends, where it stops, and when it says that nothing pays."""

import pytest

from draftsmith.infer.measure.report.verdict import SpeedPoint, not_ties, verdict


def point(size, speedup, low=None, high=None):
    return SpeedPoint(size, speedup, None if low is None else (low, high))


def test_the_fastest_that_pays_is_recommended_with_its_interval_and_the_place_where_it_stops_paying():
    points = {
        "rest": [point(1, 1.9, 1.8, 2.0), point(8, 1.2, 1.1, 1.3), point(32, 0.7, 0.6, 0.8)],
        "pld": [point(1, 1.3, 1.2, 1.4), point(8, 1.1, 1.05, 1.2), point(32, 0.6, 0.5, 0.7)],
    }
    told = verdict(points, {})
    assert (told.use, told.batch_size, told.notes) == ("rest", 1, [])
    assert told.sentence == (
        "Use rest: 1.90x [1.80, 2.00] plain decoding at batch 1, 1.20x at batch 8; "
        "off above batch 8 (0.70x at batch 32)."
    )


def test_another_drafter_that_is_faster_in_a_larger_batch_is_named_there():
    points = {
        "rest": [point(1, 1.9, 1.8, 2.0), point(8, 0.9, 0.8, 0.95)],
        "pld": [point(1, 1.3, 1.2, 1.4), point(8, 1.1, 1.05, 1.2)],
    }
    told = verdict(points, {})
    assert told.sentence == "Use rest: 1.90x [1.80, 2.00] plain decoding at batch 1; at batch 8 pld is faster: 1.10x."


@pytest.mark.parametrize(
    ("own", "says"),
    [
        (
            point(1, 0.9, 0.8, 0.95),
            "No drafter pays: plain decoding wins. The nearest is pld, 0.90x [0.80, 0.95] at batch 1.",
        ),
        (point(1, 1.02, 0.97, 1.1), "No drafter pays for certain: use plain decoding."),
        (
            point(1, 2.78),
            "It is not known which drafter pays: fewer than 8 questions give no interval. The fastest was pld, 2.78x "
            "plain decoding at batch 1.",
        ),
    ],
)
def test_without_an_interval_above_1_nothing_is_recommended(own, says):
    told = verdict({"pld": [own]}, {})
    assert told.use is None
    assert told.sentence.startswith(says)


def test_a_batch_size_without_intervals_is_not_known():
    """It is neither lost by plain decoding nor a batch above which drafting is off."""
    told = verdict({"pld": [point(1, 1.5, 1.4, 1.6), point(8, 0.9)]}, {})
    assert told.sentence == (
        "Use pld: 1.50x [1.40, 1.60] plain decoding at batch 1; not known at batch 8 (fewer than 8 questions give no "
        "interval)."
    )
    told = verdict({"pld": [point(1, 0.9), point(8, 1.5, 1.4, 1.6)]}, {})
    assert told.sentence.startswith(
        "It is not known what pays at batch 1 (fewer than 8 questions give no interval); from there on use"
    )


def test_one_batch_size_says_nothing_about_larger_ones():
    assert "off" not in verdict({"pld": [point(1, 1.5, 1.4, 1.6)]}, {}).sentence


def test_a_drafter_with_wrong_answers_is_refused_however_fast_it_is():
    points = {"small": [point(1, 3.0, 2.9, 3.1)], "pld": [point(1, 1.2, 1.1, 1.3)]}
    told = verdict(points, {"small": 2, "pld": 0})
    assert told.use == "pld"
    assert told.notes == [
        "small must not be used: 2 of its answers differ from plain decoding, and no numeric tie explains it."
    ]
    alone = verdict({"small": points["small"]}, {"small": 2})
    assert alone.use is None
    assert alone.sentence.startswith("Nothing to choose from")


def test_a_drafter_within_the_winners_interval_is_named_as_not_told_apart():
    points = {"rest": [point(1, 1.9, 1.7, 2.1)], "dresd": [point(1, 1.8, 1.6, 2.0)], "pld": [point(1, 1.3, 1.2, 1.4)]}
    assert verdict(points, {}).notes == ["Within the margin of error at batch 1: dresd (1.80x [1.60, 2.00])."]


def test_the_settings_that_were_measured_are_named_with_the_drafter():
    told = verdict({"rest": [point(1, 1.9, 1.8, 2.0)]}, {}, settings={"rest": "[nodes=24]"})
    assert told.sentence.startswith("Use rest[nodes=24]: 1.90x")
    assert told.use == "rest"


def test_what_pays_in_a_larger_batch_only_is_not_recommended_for_the_smaller_one():
    points = {"rest": [point(1, 0.9, 0.8, 0.95), point(8, 1.2, 1.1, 1.3)]}
    told = verdict(points, {}, temperature=0.8)
    assert (told.use, told.batch_size) == ("rest", 8)
    assert told.sentence.startswith("At temperature 0.8 plain decoding wins at batch 1; from there on use rest: 1.20x")


def test_differences_count_against_a_drafter_at_temperature_0_unless_they_are_ties():
    figures = {"differences": [{"tie": True}, {"tie": False}, {}]}
    assert not_ties(figures, 0.0) == 2
    assert not_ties(figures, 0.8) == 0
