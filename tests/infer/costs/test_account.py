"""What a batch's account decides about a draft model: whether to run it, and whether to let it read."""

from __future__ import annotations

import pytest

from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.costs.account import DISPLACED, Account
from draftsmith.infer.costs.pass_costs import Costs, PassCost


def begun(draft: float, rows: int = 1, left: int = 100) -> tuple[Account, list[Row]]:
    """A target of one second a token in a pass of its own, and nothing for more; a draft of `draft` seconds a pass,
    that reads 10 tokens in as long."""
    costs = Costs({"target": PassCost((1, 64), (1.0, 1.0)), "small": PassCost((1, 1000), (draft, 100 * draft))})
    account = Account(costs)
    some = [Row(str(i), [5] * 50, stops=Stops(left)) for i in range(rows)]
    account.begin(some)
    return account, some


@pytest.mark.parametrize(("share", "drafts"), [(1.02, 0), (0.98, 1)])
def test_a_draft_runs_only_where_it_pays_with_the_caches_displaced(share: float, drafts: int) -> None:
    """A right child in 80 % of cases is worth 0.8 s: passes of 0.8 s that were timed alone are too long."""
    account, (row,) = begun(share * 0.8 / DISPLACED)
    assert account.expand([(1.0, row)], {}, "small", 0.8) == drafts
    count, gain, tokens = account.first_gain([(1.0, row)], {}, "small", 0.8)
    assert count == drafts
    assert gain == pytest.approx(0.016 if drafts else 0.0)
    assert tokens == pytest.approx(0.8 * drafts)
    assert account.expand([(1.0, row)], {}, None, 0.8) == 1


def test_a_prompt_is_read_only_if_the_tokens_that_are_left_repay_it() -> None:
    account, (row,) = begun(0.1)
    found = account.first_gain([(1.0, row)], {}, "small", 0.8)
    _, gain, tokens = found
    reading = DISPLACED * account.seconds("small", {row: 400})
    enough = int(reading / gain * (1 + tokens)) + 1
    assert 5 < enough < 1000
    assert account.reading_pays(found, {row: 400}, {row: enough}, "small")
    assert not account.reading_pays(found, {row: 400}, {row: enough - 2}, "small")
    assert not account.reading_pays(found, {}, {}, "small")


def test_reading_never_pays_for_a_draft_that_does_not() -> None:
    account, rows = begun(0.9, rows=3)
    unread, left = dict.fromkeys(rows, 9), dict.fromkeys(rows, 10**9)
    found = account.first_gain([(1.0, row) for row in rows], {}, "small", 0.2)
    assert found == (0, 0.0, 0.0)
    assert not account.reading_pays(found, unread, left, "small")


def test_every_row_of_a_pass_costs_what_a_row_does() -> None:
    """One second a pass, half a second a row: two rows take 2 s together, their draft 0.3 s of 0.1 and 0.1 each."""
    target, draft = PassCost((1, 64), (1.0, 1.0), per_row=0.5), PassCost((1, 64), (0.1, 0.1), per_row=0.1)
    account = Account(Costs({"target": target, "small": draft}))
    rows = [Row(str(i), [5] * 50) for i in range(2)]
    account.begin(rows)
    assert account.plain_seconds == pytest.approx(2.0 / 2)
    assert account.seconds("small", dict.fromkeys(rows, 1)) == pytest.approx(0.3)
    alike = Account(Costs({"target": target, "small": draft}), alike=2)
    alike.begin(rows[:1])
    assert alike.plain_seconds == pytest.approx(2.0 / 2)
    assert alike.seconds("small", {rows[0]: 1}) == pytest.approx(0.3 / 2)


def test_a_pass_is_weighed_with_those_that_may_follow_it() -> None:
    """A second token costs 0.5 s to verify, and seven more nothing: one is not worth it, and four are."""
    cost = PassCost((1, 2, 64), (1.0, 1.5, 1.5))
    account = Account(Costs({"target": cost, "small": PassCost((1, 64), (0.1, 0.1))}))
    row = Row("0", [5] * 50)
    account.begin([row])
    sure, unsure = (account.first_gain([(1.0, row)], {}, "small", coverage) for coverage in (0.7, 0.4))
    assert 0.7 < DISPLACED * (0.5 + 0.1) + 0.05, "one token would gain next to nothing"
    assert sure.offers == 1
    passes = next(m for m in range(1, 9) if 0.7 ** (m + 1) < DISPLACED * 0.1)
    assert sure.tokens == pytest.approx(sum(0.7**m for m in range(1, passes + 1)))
    assert sure.seconds == pytest.approx(sure.tokens - DISPLACED * (0.5 + 0.1 * passes))
    assert unsure.offers == 0


def test_a_row_is_expanded_more_than_once_only_where_each_of_its_nodes_pays() -> None:
    account, (row,) = begun(0.02)
    assert account.expand([(0.9, row), (0.5, row), (0.001, row)], {}, "small", 0.6) == 2
