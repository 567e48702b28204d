"""Which sentence a calibration ends in: the command that uses it, or that nothing pays."""

from __future__ import annotations

import pytest

from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.measure.calibrate.advice import best_speedup, next_steps


def costs(drafting):
    """The target takes 10 ms up to 16 tokens; a draft pass takes `drafting`."""
    return Costs({"target": PassCost([1, 16], [0.01, 0.01]), "small:x": PassCost([1, 16], [drafting, drafting])}, 0.0)


def test_the_best_speedup_is_that_of_the_best_length():
    assert best_speedup(costs(0.0), 1.0, 256) == pytest.approx(16)
    assert best_speedup(costs(0.01), 0.0, 256) == pytest.approx(0.5)
    assert best_speedup(costs(0.005), 0.6, 256) == pytest.approx(1.6 / 1.5)


def said(**gains):
    return " ".join(next_steps({"target": "T", "drafters": {name: {"best_speedup": g} for name, g in gains.items()}}))


def test_a_drafter_that_pays_comes_with_the_command_that_uses_it():
    assert said(small=1.4) == (
        "Use it: draftsmith bench --target T --drafters small --data QUESTIONS --out RUN. It finds these files by "
        "itself, and so does generate."
    )


def test_one_that_cannot_pay_is_named_and_left_out_of_the_command():
    lines = said(small=0.8, rest=1.2)
    assert "small does not pay here for one row: 0.80x at best." in lines
    assert "--drafters rest --data" in lines


def test_where_nothing_pays_no_command_is_given():
    lines = said(small=0.8, rest=0.9)
    assert "Nothing pays at batch size 1" in lines
    assert "Use it" not in lines


def test_without_costs_it_says_what_is_missing():
    assert "--seconds 60" in said(small=None)


def test_the_command_repeats_what_the_user_wrote():
    report = {"target": "T", "specs": {"sd2": "sd2:DIR"}, "drafters": {"sd2": {"best_speedup": 1.2}}}
    assert "--drafters sd2:DIR --data" in " ".join(next_steps(report))
