"""Where nothing was calibrated, how often each depth's candidates are right is learned while decoding."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_heads as tiny
import torch
from joining import admit, release

from draftsmith.infer.contract.protocols import Budget
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.costs.account import Account
from draftsmith.infer.costs.calibration import BandedCalibration, Calibration
from draftsmith.infer.costs.calibrator import Calibrator
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.drafters import Medusa
from draftsmith.infer.engine.step import step
from draftsmith.infer.models.hf_target import HFTarget


@pytest.fixture(scope="module")
def target() -> HFTarget:
    return HFTarget(tiny.planted_target())


def half_wrong() -> Any:
    """Heads 0 and 2 are right; head 1 is as sure, and wrong."""
    heads = tiny.planted_medusa(3)
    with torch.no_grad():
        heads.heads[1].lm_head.weight.copy_(tiny.SURE * tiny.following(9))
    return heads


def first_confidences(drafter: Any, row: Row, policy: Policy) -> dict[str, float]:
    """The confidence of each depth's best candidate."""
    (draft,) = drafter.propose([row], [Budget(64, 3)], policy)
    return {trials[0].source: trials[0].confidence for trials in draft.trials.values()}


def test_a_head_that_is_sure_and_wrong_is_found_out(target: HFTarget) -> None:
    drafter = Medusa(half_wrong(), top_k=2, nodes=14, min_confidence=0.0)
    drafter.bind(target)
    row = Row("0", [3, 10, 17], stops=Stops(60))
    admit(target, drafter, [row])
    before = first_confidences(drafter, row, Policy())
    assert min(before.values()) > 0.99
    for _ in range(8):
        step(target, drafter, [row], Budget(64, 3))
    after = first_confidences(drafter, row, Policy())
    assert after["medusa:1"] > 0.99
    assert after["medusa:2"] < 0.3
    assert after.get("medusa:3", 1.0) > 0.99, "it was never up for acceptance"
    assert first_confidences(drafter, row, Policy(raw=True)) == before
    halved = {f"medusa:{number}": Calibrator((0.0, 1.0), (0.1, 0.5)) for number in (1, 2, 3)}
    known = Policy(calibration=BandedCalibration.of(Calibration("any", halved)))
    assert {round(one, 2) for one in first_confidences(drafter, row, known).values()} == {0.5}
    release(target, drafter, [row])
    assert not drafter._learned._stated


def test_later_rounds_of_a_draft_that_is_made_at_once_cost_nothing() -> None:
    """One pass of the heads is not worth a single token, and is worth four."""
    account = Account(Costs({"target": PassCost((1, 64), (1.0, 1.01)), "medusa": PassCost((1,), (1.0,))}))
    row = Row("0", [3, 10, 17])
    account.begin([row])
    assert account.expand([(1.0, row)], {}, "medusa", 0.9) == 0
    assert account.expand([(1.0, row)], {}, "medusa", 0.9, at_once=True) == 1
    assert not account.lengthen(1.0, 0.9, 0, 4, "medusa", 1)
    assert account.lengthen(1.0, 0.9, 0, 4, "medusa", 1, at_once=True)
