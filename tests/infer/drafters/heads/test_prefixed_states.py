"""The prefix layer of Hydra++: what the heads start from is a fresh pass of the layer over the target's true states."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_heads as tiny
import torch
from joining import admit, release
from planted import plant

from draftsmith.infer.contract.protocols import Budget
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.drafters import Hydra
from draftsmith.infer.drafters.heads import prefixed_states
from draftsmith.infer.drafters.heads.prefixed_states import PrefixedStates
from draftsmith.infer.engine.step import step
from draftsmith.infer.models.hf_target import HFTarget


@pytest.fixture(scope="module")
def target() -> HFTarget:
    return HFTarget(tiny.planted_target())


def make_drafter(**given: Any) -> Any:
    return Hydra(tiny.planted_hydra(4, prefix=True), sample="likeliest", **given)


@torch.no_grad()
def fresh(target: HFTarget, drafter: Any, row: Row) -> torch.Tensor:
    states_1NH = target.model(torch.tensor([row.ids[:-1]]), output_hidden_states=True).hidden_states[-1]
    prefix = drafter.reader.method.heads.prefix
    made: torch.Tensor = prefix(inputs_embeds=states_1NH, position_ids=torch.arange(len(row.ids) - 1)[None])
    return made.logits[0, -1]  # type: ignore[attr-defined, no-any-return]


def run(target: HFTarget, drafter: Any) -> tuple[float, list[int]]:
    """The largest error of the newest states after each step, and how much each step accepted."""
    drafter.bind(target)
    warm = Settings(temperature=1.3, seed=2)
    rows = [Row(str(i), [(7 * i + j * j) % 24 for j in range(3 + 9 * i)], warm, Stops(90)) for i in range(3)]
    admit(target, drafter, rows, chunk=8)
    errors, accepted = [0.0], []
    for number in range(8):
        assert all(drafter.reader.can_draft(row) for row in rows)
        if number % 3 == 0:
            drafter.propose(rows, [Budget(40, 4)] * 3)
            target.abandon(rows)
            drafter.abandon(rows)
        accepted += [trace.accepted for trace in step(target, drafter, rows, Budget(40, 4))]
        found = drafter.reader.states.newest(rows)
        errors += [float((one - fresh(target, drafter, row)).abs().max()) for one, row in zip(found, rows)]
    release(target, drafter, rows)
    assert not drafter.reader.states._rows
    return max(errors), accepted


def test_the_layer_has_read_the_true_states_and_no_others(target: HFTarget) -> None:
    error, accepted = run(target, make_drafter())
    assert error < 1e-5  # norms compute in float32
    assert {0, 4} < set(accepted)


def test_planted_states_at_wrong_positions_are_caught(monkeypatch: pytest.MonkeyPatch, target: HFTarget) -> None:
    plant(monkeypatch, PrefixedStates, "take", "states_TH.to(self._nothing)", "states_TH.flip(0).to(self._nothing)")
    assert run(target, make_drafter())[0] > 1e-3


def test_the_layer_s_passes_are_timed_charged_and_counted(target: HFTarget) -> None:
    costs = Costs({"target": PassCost((1, 64), (1.0, 1.01)), "hydra": PassCost((1,), (0.01,)),
                   "hydra prefix": PassCost((1, 64), (0.01, 0.02))})  # fmt: skip
    drafter = make_drafter(costs=costs)
    drafter.bind(target)
    assert set(drafter.pass_timers()) == {"hydra", "hydra prefix"}
    for timer in drafter.pass_timers().values():
        timer.place(2, 16)
        timer.run(3)
        timer.close()
    policy, charged = Policy.of(target, drafter), list[tuple[str, int]]()
    charge = policy.charge

    def noted(name: str, tokens: Any, entering: bool = True) -> None:
        charged.append((name, sum(tokens.values())))
        charge(name, tokens, entering)

    policy.charge = noted  # type: ignore[method-assign]
    row = Row("0", [3, 10, 17, 4], stops=Stops(40))
    admit(target, drafter, [row])
    before = drafter.bytes_moved
    for _ in range(3):
        step(target, drafter, [row], Budget(16, 4), policy=policy)
    names = [name for name, _ in charged]
    assert names.count("hydra prefix") >= 2
    assert names.count("hydra") > names.count("hydra prefix")
    assert drafter.bytes_moved > before
    release(target, drafter, [row])


def test_a_row_that_lost_states_is_not_drafted_any_more(target: HFTarget, caplog: pytest.LogCaptureFixture) -> None:
    drafter = make_drafter()
    drafter.bind(target)
    row = Row("0", [3, 10, 17, 4], stops=Stops(40))
    admit(target, drafter, [row])
    step(target, drafter, [row], Budget(16, 4))
    observe, drafter.observe = drafter.observe, lambda *given: None
    step(target, drafter, [row], Budget(16, 4))
    drafter.observe = observe
    traces = [step(target, drafter, [row], Budget(16, 4))[0] for _ in range(3)]
    assert [trace.nodes for trace in traces] == [0, 0, 0]
    assert caplog.text.count("lost states of the target") == 1
    release(target, drafter, [row])


def test_rows_beyond_the_layer_s_context_are_not_drafted(target: HFTarget) -> None:
    drafter = make_drafter()
    drafter.reader.method.heads.prefix.config.max_position_embeddings = 12
    drafter.bind(target)
    row, longer = Row("0", [3, 10, 17], stops=Stops(40)), Row("1", [5] * 14, stops=Stops(40))
    admit(target, drafter, [row, longer])
    drafted = [[trace.nodes > 0 for trace in step(target, drafter, [row, longer], Budget(16, 4))] for _ in range(14)]
    assert drafted[0] == [True, False]
    assert drafted[-1] == [False, False]
    assert prefixed_states.max_positions(drafter.reader.method.heads.prefix.config) == 12
    release(target, drafter, [row, longer])
