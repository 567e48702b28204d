"""Pictures: round ticks, places in order, escaped text, and nothing drawn from nothing."""

import itertools
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftsmith.infer.measure.report import charts
from draftsmith.infer.measure.report.charts import SHAPES, AxisScale, Series, Spot, Svg, nice

EVIL = '<script>alert(1)</script> & "co"'


def texts(markup):
    return [element.text for element in ET.fromstring(str(markup)).iter() if element.tag in ("text", "title")]


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_within_the_scale(low, span):
    scale = AxisScale(low, low + span, 0, 100)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 7
    assert all(low - span * 1e-6 <= tick <= low + span * (1 + 1e-6) for tick in ticks)


@pytest.mark.parametrize(("step", "rounded"), [(0.7, 1), (1, 1), (1.2, 2), (3, 5), (0.03, 0.05), (800, 1000), (0, 1)])
def test_a_step_is_rounded_up_to_1_2_or_5(step, rounded):
    assert nice(step) == pytest.approx(rounded)


def test_every_picture_is_well_formed_and_escapes_names():
    evil = Series(EVIL, 0)
    pictures = [
        charts.speedups([(evil, [Spot(1.5, (1.2, 1.8), EVIL), Spot(0.9)])]),
        charts.lengths([(evil, 1.5, 3.0), (Series("plain"), 1.0, 1.0)]),
        charts.lines(EVIL, [(evil, {0: 0.5, 2: 0.7})], ["1", EVIL, "3"], EVIL, percent=True),
        charts.shares([(EVIL, {"target": 0.5, "draft": 0.3, "overhead": 0.2})]),
        charts.bars(EVIL, {EVIL: 3, "b": 0}, "s0"),
        charts.bullet(evil, 2.5, 1.5, 8.0),
        charts.swatch(evil),
    ]
    for picture in pictures:
        tree = ET.fromstring(str(picture))
        assert not list(tree.iter("script"))
        assert len(list(tree)) > 0
    assert EVIL in " ".join(text for text in texts(pictures[0]) if text)


def test_nothing_is_drawn_from_nothing():
    nothing = {"target": None, "draft": 0.0, "overhead": None}
    empty = [
        charts.speedups([]),
        charts.speedups([(Series("a", 0), [])]),
        charts.lengths([]),
        charts.lines("t", [], [], "x"),
        charts.shares([("a", nothing)]),
        charts.bars("t", {}, "s0"),
    ]
    assert [str(one) for one in empty] == [""] * len(empty)


def test_what_is_faster_lies_further_right_and_all_of_it_on_the_paper():
    spots = [Spot(0.4, (0.3, 0.5)), Spot(1.0, (0.9, 1.1)), Spot(2.5, (2.0, 3.1))]
    tree = ET.fromstring(str(charts.speedups([(Series("a", 0), spots)])))
    whiskers = [one for one in tree.iter("line") if "whisker" in one.get("class")]
    starts = [float(one.get("x1")) for one in whiskers]
    assert starts == sorted(starts)
    assert starts[0] >= charts.NAMES
    assert float(whiskers[-1].get("x2")) < charts.WIDTH - 100


def test_a_point_on_a_ray_of_the_length_picture_has_that_speedup():
    tree = ET.fromstring(str(charts.lengths([(Series("a", 0), 1.5, 3.0)])))
    rays = {text.text: line for text, line in zip(
        [one for one in tree.iter("text") if one.get("class") == "ray-name"],
        [one for one in tree.iter("line") if one.get("class") in ("ray", "even")],
    )}  # fmt: skip
    ray = rays["2x"]
    x1, y1, x2, y2 = (float(ray.get(key)) for key in ("x1", "y1", "x2", "y2"))
    marker = next(one for one in tree.iter("path")).get("d")
    x, y = (float(part) for part in marker[1:].split("a")[0].split(","))
    assert (y - y1) / (x + 5.5 - x1) == pytest.approx((y2 - y1) / (x2 - x1), rel=0.02)


@pytest.mark.parametrize(("cost", "length"), [(2.64, 1.28), (1.5, 3.0), (1.05, 9.0), (4.0, 1.1)])
def test_names_of_rays_do_not_cover_one_another_and_that_of_plain_decoding_is_there(cost, length):
    tree = ET.fromstring(str(charts.lengths([(Series("a", 0), cost, length)])))
    named = [text for text in tree.iter("text") if text.get("class") == "ray-name"]
    assert "1x" in {text.text for text in named}
    top = sorted(float(text.get("x")) for text in named if float(text.get("y")) < 20)
    assert all(after - before >= 24 for before, after in itertools.pairwise(top))


def test_shapes_and_colours_differ_between_neighbours():
    series = [Series(str(at), at) for at in range(8)]
    assert len({(one.shape, one.css) for one in series}) == 8
    assert len({one.shape for one in series[:6]}) == len(SHAPES)
    outlines = {str(charts.swatch(one)).replace(one.css, "") for one in series[:6]}
    assert len(outlines) == 6


def test_a_long_name_is_cut_in_the_picture_and_whole_in_its_tip():
    name = "a drafter with a very long name indeed"
    drawn = str(charts.speedups([(Series(name, 0), [Spot(1.2, (1.1, 1.3))])]))
    assert f"<title>{name}" in drawn
    assert f">{name}<" not in drawn


def test_an_svg_without_parts_is_still_an_svg():
    assert ET.fromstring(str(Svg(10, 10, "t").markup())).get("viewBox") == "0 0 10 10"
