"""How much is drawn: each row decides alone, by what its passes cost among rows like it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from draftsmith.infer.contract.draft import Draft
from draftsmith.infer.contract.protocols import Budget
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.costs.calibration import BandedCalibration, Calibration
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.costs.policy import Policy, drawn_share
from draftsmith.infer.drafters import SD2, SmallLM
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.models.hf_target import HFTarget


def costs_of(per_node: float, **draft: float) -> Costs:
    """A target whose pass takes one second for a token, and `per_node` more for each further one."""
    passes = {name: PassCost((1, 201), (seconds, 1.1 * seconds)) for name, seconds in draft.items()}
    return Costs({"target": PassCost((1, 201), (1.0, 1.0 + 200 * per_node)), **passes})


DRAWN = {
    "chain": lambda model: SmallLM(model, sample="drawn", costs=costs_of(0.04, small=0.06)),
    "small": lambda model: SmallLM(
        model, sample=True, top_k=3, nodes=8, num_draft_tokens=5, costs=costs_of(0.04, small=0.06)
    ),
    "sd2": lambda model: SD2(
        model, [1, 2], sample=True, top_k=3, nodes=8, costs=costs_of(0.04, **{"sd2:1": 0.03, "sd2:2": 0.05})
    ),
}


def test_a_drawn_chain_is_shorter_where_rows_share_their_passes(make_model: Any, shake: Any) -> None:
    """One more token of one row costs nothing beside its weights; of eight rows, as much as another row."""
    model = make_model("llama")
    dear = Costs({"target": PassCost((1, 8, 80), (1.0, 1.0, 10.0)), "small": PassCost((1, 8, 80), (0.1, 0.1, 1.0))})
    drawn = {}
    for batch_size in (1, 8):
        target, drafter = HFTarget(model), SmallLM(shake(model, 0.02), sample="drawn", costs=dear)
        drafter.bind(target)
        rows = [Row(str(i), [5 + i, 9], Settings(temperature=0.9, seed=4), Stops(24)) for i in range(8)]
        policy = Policy.of(target, drafter, batch_size=batch_size)
        done = generate(target, drafter, rows, batch_size=8, policy=policy)
        drawn[batch_size] = sum(trace.nodes for one in done for trace in one.traces)
    assert drawn[8] < 0.5 * drawn[1]


def test_a_drawn_row_is_not_read_for_what_little_is_left_of_it(make_model: Any, shake: Any) -> None:
    """The prompt goes through the draft before its first draft: ten times a plain step here."""
    model = make_model("llama")
    costs = Costs({"target": PassCost((1, 16), (1.0, 1.2)), "small": PassCost((1, 32), (0.05, 10.0))})
    prompt = [5 + i % 40 for i in range(33)]
    drafted = {}
    for new in (6, 120):
        drafter = SmallLM(shake(model, 0.02), costs=costs, calibration="none", sample="drawn")
        target = HFTarget(model)
        drafter.bind(target)
        row = Row("0", prompt, Settings(temperature=0.9, seed=4), Stops(new))
        (done,) = generate(target, drafter, [row], policy=Policy(costs))
        drafted[new] = sum(trace.nodes for trace in done.traces)
    assert drafted[6] == 0
    assert drafted[120] > 20


@pytest.mark.parametrize(("accepted", "drafts"), [(0.05, False), (0.8, True)])
def test_what_calibration_measured_decides_whether_a_row_begins_to_draw(accepted: float, drafts: bool) -> None:
    known = Calibration("t", {}, measured={"s": {"first_accepted": accepted}}, temperature=0.8, coupled=True)
    policy, row = Policy(costs_of(0.1, s=0.2), BandedCalibration.of(known)), Row("0", [5] * 10, Settings(0.8))
    policy.begin([row])
    account = policy.alone(row)
    assert account.lengthen(1.0, account.found, 0, 8, "s", 1) is drafts
    assert drawn_share(accepted) == pytest.approx(account.found)
    assert accepted < drawn_share(accepted) < 2 * accepted / (1 + accepted)


@pytest.mark.parametrize(("draft_seconds", "least", "most"), [(3.0, 0.15, 0.4), (0.01, 0.9, 1.0)])
def test_a_row_that_does_not_draw_is_asked_seldom(
    make_model: Any, shake: Any, monkeypatch: Any, draft_seconds: float, least: float, most: float
) -> None:
    """Deciding takes time as well: 0.05 s here, where a plain step takes one."""
    model = make_model("llama")
    costs = replace(costs_of(0.01, small=draft_seconds), asking=0.05)
    target, drafter = HFTarget(model), SmallLM(shake(model, 0.02), sample="drawn", costs=costs, calibration="none")
    drafter.bind(target)
    asked = []
    propose = drafter.propose

    def noted(rows: Sequence[Row], budgets: Sequence[Budget], policy: Policy | None = None) -> list[Draft]:
        asked.extend(budget.nodes > 0 for budget in budgets)
        return propose(rows, budgets, policy)

    monkeypatch.setattr(drafter, "propose", noted)
    rows = [Row(str(i), [5 + i, 9], Settings(temperature=0.9, seed=4), Stops(100)) for i in range(2)]
    done = generate(target, drafter, rows, batch_size=2, policy=Policy(costs, batch_size=2))
    assert least < sum(asked) / len(asked) <= most
    assert (sum(trace.nodes for one in done for trace in one.traces) > 50) == (draft_seconds < 1)


@pytest.mark.parametrize(("name", "asking"), [*((name, 0.0) for name in DRAWN), ("chain", 0.05)])
def test_a_drawn_rows_text_depends_neither_on_its_batch_nor_on_what_ran_before(
    make_model: Any, shake: Any, name: str, asking: float
) -> None:
    """Contexts grow by different amounts, so passes of other rows cost otherwise than its own."""
    model = make_model("llama")
    draft = shake(model, 0.4 if asking else 0.08)
    costs = DRAWN[name](draft).costs
    if asking:  # a close call, so that rows decline for a while and are asked seldom
        passes = {key: cost if key == "target" else _times(cost, 9.0) for key, cost in costs.passes.items()}
        costs = replace(costs, passes=passes, asking=asking)
    target = HFTarget(model)
    drafter = DRAWN[name](draft)
    drafter.bind(target)

    def rows(keys: Sequence[int]) -> list[Row]:
        prompts = {key: [5 + key, 9, *range(3, 3 + 7 * key), 12 + key] for key in keys}
        return [Row(str(k), prompts[k], Settings(temperature=0.9, seed=4), Stops(40 + 3 * k)) for k in keys]

    def run(keys: Sequence[int], batch_size: int, policy: Policy) -> dict[str, tuple[list[int], list[int]]]:
        done = generate(target, drafter, rows(keys), batch_size=batch_size, policy=policy)
        return {one.row: (one.token_ids, [trace.nodes for trace in one.traces]) for one in done}

    alone = {key: found for k in range(5) for key, found in run([k], 1, Policy(costs)).items()}
    assert run(range(5), 5, Policy(costs)) == alone
    used = Policy(costs)
    generate(target, drafter, [Row("x", [7, 7, 8], Settings(temperature=1.3, seed=1), Stops(60))], policy=used)
    generate(target, drafter, [Row("y", [3, 4], Settings(), Stops(30))], policy=used)
    assert run([3, 0, 4, 1, 2], 3, used) == alone
    assert not used._alone, "rows that left are forgotten"
    assert len({token for tokens, _ in alone.values() for token in tokens}) >= 8
    sizes = [count for _, counts in alone.values() for count in counts]
    assert len(set(sizes)) > 2, "the sizes of drafts varied"
    assert not asking or 0.2 < sizes.count(0) / len(sizes) < 0.95


def _times(cost: PassCost, factor: float) -> PassCost:
    return replace(cost, seconds=[factor * one for one in cost.seconds])
