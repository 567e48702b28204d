"""The acceptance of drawn tokens, by how concentrated their distribution is: learned from verdicts, and forgotten."""

from __future__ import annotations

import random
from statistics import fmean

import pytest
import torch

from draftsmith.infer.contract.row import Row
from draftsmith.infer.costs.acceptance import Acceptance, concentration
from draftsmith.infer.costs.account import Account
from draftsmith.infer.costs.pass_costs import Costs, PassCost


def test_concentration_is_the_mean_confidence_of_a_draw() -> None:
    assert concentration(torch.tensor([0.5, 0.25, 0.25])) == pytest.approx(0.375)
    assert concentration(torch.tensor([0.0, 1.0])) == 1.0


@pytest.mark.parametrize(("flat", "peaked"), [(0.4, 0.9), (0.7, 0.7), (0.8, 0.5), (0.0, 0.05)])
def test_it_learns_what_verdicts_say(flat: float, peaked: float) -> None:
    """On average: it remembers about a hundred verdicts, and the prior still pulls."""
    draw, found = random.Random(3), Acceptance()
    said: dict[float, list[float]] = {0.1: [], 0.9: []}
    for number in range(2000):
        at = draw.choice((0.1, 0.9))
        if number > 200:
            said[at].append(found.of(at))
        found.observe(at, draw.random() < (flat if at < 0.5 else peaked))
    assert fmean(said[0.1]) == pytest.approx(flat, abs=0.12)
    assert fmean(said[0.9]) == pytest.approx(peaked, abs=0.12)


def test_what_is_no_longer_observed_returns_to_the_prior() -> None:
    found, prior = Acceptance(), Acceptance()
    for _ in range(40):
        found.observe(0.3, False)
    assert found.of(0.3) < 0.25
    for _ in range(2000):
        found.forget(0.02)
    assert found.of(0.3) == pytest.approx(prior.of(0.3), abs=0.02)


@pytest.mark.parametrize("accepted", [0.2, 0.6, 0.9])
def test_it_starts_from_what_was_measured_elsewhere_and_returns_to_that(accepted: float) -> None:
    found = Acceptance.expecting(accepted)
    assert found.of(0.4) == pytest.approx(accepted, abs=0.01)
    for _ in range(60):
        found.observe(0.4, accepted < 0.5)
    assert abs(found.of(0.4) - accepted) > 0.2
    for _ in range(2000):
        found.forget(0.02)
    assert found.of(0.4) == pytest.approx(accepted, abs=0.05)


def test_any_run_of_outcomes_stays_finite() -> None:
    draw = random.Random(1)
    found = Acceptance()
    for number in range(3000):
        found.observe(draw.choice((0.0, 1.0, 0.5)), (number // 500) % 2 == 0)
        assert 0 < found.of(0.0) < 1
        assert 0 < found.of(1.0) < 1


def account(target: PassCost, draft: PassCost) -> Account:
    made = Account(Costs({"target": target, "small": draft}), displaced=1.0)
    made.begin([Row("0", [5, 6, 7])])
    return made


def test_a_chain_is_lengthened_as_long_as_a_token_is_worth_more_than_it_takes() -> None:
    """Plain decoding takes 1 second a token; one more drafted token takes .3 and .1."""
    own = account(PassCost((1, 11), (1.0, 2.0)), PassCost((1, 64), (0.3, 0.3)))
    assert own.lengthen(0.7, 0.6, 1, 8, "small", 1)  # .42 of a token
    assert not own.lengthen(0.6, 0.6, 1, 1, "small", 1)  # .36
    assert own.lengthen(0.6, 0.6, 1, 8, "small", 0), "the pass was made: only its verification counts"
    assert not own.lengthen(0.1, 0.9, 1, 8, "small", 0)


def test_one_token_alone_need_not_pay_where_several_do() -> None:
    """A pass of 2 to 4 tokens is padded to 4."""
    padded = account(PassCost((1, 4, 8), (1.0, 1.8, 2.6), buckets=(1, 4, 8)), PassCost((1, 64), (0.05, 0.05)))
    assert not padded.lengthen(1.0, 0.7, 0, 1, "small", 1)
    assert padded.lengthen(1.0, 0.7, 0, 3, "small", 1)
    assert padded.lengthen(0.5, 0.7, 1, 1, "small", 1), "the rest of the padded pass is free"


def test_a_pass_costs_more_where_few_of_the_rows_alike_come_to_it() -> None:
    """Eight rows share a pass that takes as long for one of them. Until steps have shown otherwise, all of them do."""
    target, draft = PassCost((1, 64), (8.0, 8.6)), PassCost((1, 64), (2.0, 2.0))
    made, row = Account(Costs({"target": target, "small": draft}), 1.0, alike=8), Row("0", [5, 6, 7])

    def step(passes: int) -> bool:
        made.begin([row])
        worth = made.lengthen(0.8, 0.8, 1, 1, "small", 1)
        for _ in range(passes):
            made.charge("small", {row: 1}, entering=True)
        made.settle({row: passes}, 1 + passes)
        return worth

    assert [step(2) for _ in range(30)] == [True] * 30
    found = [step(1) for _ in range(60)]
    assert found[0]
    assert not found[-1], "one row of eight would run that pass alone"
    assert not step(0)


def test_blocks_that_follow_a_pass_are_learned_in_a_few_steps() -> None:
    made, row = Account(Costs({"target": PassCost((1,), (1.0,)), "a": PassCost((1,), (0.1,))})), Row("0", [5, 6])
    for _ in range(3):
        made.begin([row])
        made.charge("a", {row: 1}, entering=True)
        made.charge("a", {row: 1}, entering=False)
        made.settle({row: 1}, 1)
    assert made.deepening == pytest.approx(1.75, abs=0.01)
