"""Asking for drafts costs next to nothing where nothing of them is worth verifying, and good ones are found again."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from draftsmith.infer.contract.draft import ROOT, Draft, Group
from draftsmith.infer.contract.protocols import Budget, Verdict
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.costs.asking import SHARE, Asking
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.drafters import SmallLM
from draftsmith.infer.drafters.controls import Empty, adversary, oracle
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.recorded_target import RecordedTarget

VOCAB, LENGTH, ROWS = 50, 300, 4
# A pass takes a second, and half a second for each further token; proposing for a row takes 0.05 s.
COSTS = Costs({"target": PassCost((1, 101), (1.0, 51.0))}, asking=0.05)
FREE = replace(COSTS, asking=0.0)


class Listener:
    """Counts the rows that a drafter is asked for with a budget."""

    def __init__(self, drafter: Any, switch: Any = None, switch_at: int = LENGTH) -> None:
        self.drafter, self.switch, self.switch_at = drafter, switch, switch_at
        self.asked = self.steps = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.drafter, name)

    def learn(self, answers: Any) -> None:
        for one in (self.drafter, self.switch):
            if one is not None:
                one.learn(answers)

    def bind(self, target: Any) -> None:
        for one in (self.drafter, self.switch):
            if one is not None:
                one.bind(target)

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget], policy: Any = None) -> list[Draft]:
        self.steps += len(rows)
        self.asked += sum(budget.nodes > 0 for budget in budgets)
        late = self.switch is not None and len(rows[0].new_ids) >= self.switch_at
        drafts: list[Draft] = (self.switch if late else self.drafter).propose(rows, budgets, policy)
        return drafts


def decode(drafter: Listener, costs: Costs, rows: int = ROWS, batch_size: int = ROWS) -> list[Any]:
    draw = random.Random(0)
    answers = {str(i): [draw.randrange(VOCAB) for _ in range(LENGTH)] for i in range(rows)}
    target = RecordedTarget(answers, VOCAB)
    drafter.bind(target)
    drafter.learn(answers)
    given = [Row(key, [1, 2], Settings(), Stops(LENGTH)) for key in answers]
    done = generate(target, drafter, given, batch_size=batch_size, policy=Policy(costs))
    assert [one.token_ids for one in done] == list(answers.values())
    return done


def test_asking_for_useless_drafts_takes_at_most_its_share():
    useless = Listener(adversary(8))
    done = decode(useless, COSTS)
    plain = COSTS.of("target")(ROWS) / ROWS
    assert useless.asked * COSTS.asking < 1.3 * SHARE * plain * useless.steps + 8 * ROWS * COSTS.asking
    assert sum(trace.accepted for one in done for trace in one.traces) == 0


def test_who_drafts_well_is_asked_in_every_step():
    good = Listener(oracle(8))
    decode(good, COSTS)
    assert good.asked > 0.95 * good.steps


def test_asking_that_costs_nothing_is_not_limited():
    useless = Listener(adversary(8))
    decode(useless, FREE)
    assert useless.asked == useless.steps - ROWS, "the last token of a row needs no draft"


def test_a_drafter_that_becomes_right_is_found_again():
    late = Listener(adversary(8), oracle(8), switch_at=LENGTH // 2)
    done = decode(late, COSTS)
    after = [trace for one in done for trace in one.traces if trace.context >= 2 + LENGTH * 3 // 4]
    assert sum(trace.accepted for trace in after) > 2 * len(after)


@pytest.mark.parametrize(("draft_seconds", "least", "most"), [(5.0, 0.1, 0.35), (0.01, 0.9, 1.0)])
def test_a_draft_model_that_never_pays_is_asked_seldom_and_one_that_pays_always(
    make_model: Any, shake: Any, draft_seconds: float, least: float, most: float
) -> None:
    """It decides while it builds its drafts, and that takes time as well: every fifth step here, once that is clear."""
    model = make_model("llama")
    small = PassCost((1, 201), (draft_seconds, 1.1 * draft_seconds))
    costs = replace(COSTS, passes={"target": PassCost((1, 201), (1.0, 1.1)), "small": small})
    target, drafter = HFTarget(model), Listener(SmallLM(shake(model, 0.005), costs=costs, top_k=2, nodes=6))
    rows = [Row(str(i), [5 + i, 9], Settings(), Stops(100)) for i in range(2)]
    drafter.bind(target)
    done = generate(target, drafter, rows, batch_size=2, policy=Policy(costs))
    assert least * drafter.steps < drafter.asked <= most * drafter.steps
    again = [Row(str(i), [5 + i, 9], Settings(), Stops(100)) for i in range(2)]
    assert [one.token_ids for one in done] == [one.token_ids for one in generate(target, Empty(), again)]
    accepted = sum(trace.accepted for one in done for trace in one.traces)
    assert (accepted > 20) == (draft_seconds < 1)


def test_drawn_drafts_are_asked_for_whatever_they_gain():
    """Whether a drawn draft is asked for changes the text, so it must not depend on other rows."""
    policy, row, budget = Policy(COSTS), Row("a", [1, 2], Settings(1.0), Stops(LENGTH)), Budget(8, 8)
    for _ in range(200):
        policy.begin([row])
        assert policy.limits([row], [budget]) == [budget]
        draft = Draft()
        draft.sampled(ROOT, 3, Group(torch.full((VOCAB,), 1 / VOCAB)), "mine", 0.02)
        (cut,) = policy.cut([row], [draft])
        verdict = Verdict([], [], 4, committed=[4])
        policy.settle([row], [cut], [verdict])


def test_a_step_that_failed_is_decided_in_the_same_way_again():
    policy = Policy(COSTS)
    row, budget = Row("a", [1, 2], Settings(), Stops(LENGTH)), Budget(8, 8)
    seen = []
    for _ in range(100):
        policy.begin([row])
        first = policy.limits([row], [budget])
        policy.begin([row])
        assert policy.limits([row], [budget]) == first
        seen.append(first[0].nodes)
        draft = Draft().chain([3] if first[0].nodes else [], "mine", [0.01] if first[0].nodes else [])
        policy.settle([row], policy.cut([row], [draft]), [Verdict([], [], 4, committed=[4])])
    assert 0 < seen.count(8) < 60


@pytest.mark.parametrize("seconds", [0.0, 0.001])
def test_an_ask_below_the_share_is_never_saved(seconds):
    asking, row = Asking(seconds), Row("a", [1], Settings(), Stops(LENGTH))
    for _ in range(50):
        assert asking.wanted(row, 1.0)
        asking.settle({row: -1.0}, set())
