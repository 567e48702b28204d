"""SD2: budgets hold for every setting and are used when it pays, lazy filling changes nothing, exits follow the costs,
and what does not fit is refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from joining import admit, release

from draftsmith.infer.contract.protocols import Budget
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.costs.calibration import BandedCalibration, Calibration, calibration_path
from draftsmith.infer.costs.calibrator import Calibrator
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.drafters import SD2
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.models.hf_target import HFTarget

LAYERS = 4


@pytest.fixture(scope="module")
def target_model(make_model: Any) -> Any:
    return make_model("llama")


@pytest.fixture(scope="module")
def draft_model(make_model: Any) -> Any:
    return make_model("llama", num_hidden_layers=LAYERS, seed=3)


def rows(count: int, left: int = 30) -> list[Row]:
    return [Row(str(i), [5 + i, 9, 12 + i, 7][: 2 + i % 3], Settings(), Stops(left)) for i in range(count)]


def costs(target: float, block: float, growth: float = 0.0) -> Costs:
    """A target's and a block's seconds for one token, and how much more 64 of them take, as a share."""
    passes = {f"sd2:{exit}": PassCost((1, 64), (block, block * (1 + growth))) for exit in (1, 2, 3, 4)}
    return Costs({"target": PassCost((1, 64), (target, target * (1 + growth))), **passes})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    top_k=st.integers(1, 6), depth=st.integers(0, 7), nodes=st.integers(0, 20), limit=st.integers(1, 20),
    exits=st.sets(st.integers(1, 3)), width=st.integers(1, 4), count=st.integers(1, 3),
    selection=st.sampled_from(["cost", "threshold", "fixed"]),
)  # fmt: skip
def test_budgets_hold_for_every_setting_and_are_used_when_it_pays(
    target_model: Any, draft_model: Any, top_k: int, depth: int, nodes: int, limit: int, exits: set[int], width: int,
    selection: str, count: int,
) -> None:  # fmt: skip
    all_exits = [*sorted(exits), LAYERS]
    free = costs(1.0, 1e-9)  # drafting and verifying more costs nothing: all that is allowed should be drafted
    drafter = SD2(
        draft_model, all_exits, selection, exit=all_exits[0] if selection == "fixed" else None, num_draft_tokens=7,
        top_k=top_k, nodes=limit, width=width, costs=free,
    )  # fmt: skip
    target, some = HFTarget(target_model), rows(count)
    drafter.bind(target)
    admit(target, drafter, some)
    policy = Policy.of(target, drafter)
    policy.begin(some)
    drafts = drafter.propose(some, [Budget(nodes, depth)] * count, policy)
    release(target, drafter, some)
    allowed = min(nodes, limit) if top_k > 1 else min(nodes, depth, 7)
    for draft in drafts:
        draft.check(61)
        assert len(draft) <= allowed
        assert draft.depth <= depth
        assert {exit for _, exit in draft.exits} <= set(all_exits)
        # Every level offers top_k children at least: all that the budget takes is used.
        if min(depth, 7) * top_k >= allowed:
            assert len(draft) == allowed


@pytest.mark.parametrize("top_k", [1, 3])
def test_filling_lazily_gives_what_filling_eagerly_gives(target_model: Any, draft_model: Any, top_k: int) -> None:
    """Identical drafts step by step, and keys and values equal wherever a lazily filled block has seen anything."""
    made: dict[bool, list[Any]] = {}
    caches: dict[tuple[bool, int, int], list[torch.Tensor]] = {}
    behind = 0
    for eager in (False, True):
        target = HFTarget(target_model)
        drafter = SD2(
            draft_model, [1, 2, 4], "threshold", thresholds=[0.115, 0.105, 0.0], top_k=top_k, nodes=10, eager=eager,
            costs="none", min_confidence=0.0, num_draft_tokens=4,
        )  # fmt: skip
        drafter.bind(target)
        some = rows(3, left=40)
        admit(target, drafter, some)
        made[eager] = []
        for number in range(8):
            drafts = drafter.propose(some, [Budget(10, 4)] * 3)
            made[eager].append([(draft.tokens, draft.parents, draft.exits) for draft in drafts])
            verdicts = [_keep(draft, number) for draft in drafts]
            for row, verdict in zip(some, verdicts):
                row.ids.extend(verdict.committed)
            drafter.observe(some, verdicts, [])
            behind += sum(drafter.reader.lm._rows[row].filled[2] < drafter.reader.lm.length(row) for row in some)
        lm = drafter.reader.lm
        for b, row in enumerate(some):
            for layer, block in enumerate((0, 1, 2, 2)):
                held = lm._rows[row]
                seen = slice(held.own.start, held.own.start + held.filled[block])
                caches[eager, b, layer] = [
                    kept[layer][:, seen].transpose(0, 1) for kept in (lm.cache.keys, lm.cache.values)
                ]
    assert behind, "something was left out"
    assert made[False] == made[True]
    assert {exit for step in made[False] for _, _, exits in step for _, exit in exits} == {1, 2, 4}
    for (eager, b, layer), lazy in caches.items():
        for ours, theirs in zip(lazy, caches[True, b, layer]) if not eager else ():
            assert len(ours)
            torch.testing.assert_close(ours, theirs[: len(ours)], rtol=0, atol=1e-12)


def _keep(draft: Any, number: int) -> Any:
    """A verdict that accepts some path, whatever the target would say."""
    from draftsmith.infer.contract.protocols import Verdict

    path: list[int] = []
    parent = -1
    for _ in range(number % 4):
        children = [node for node, above in enumerate(draft.parents) if above == parent]
        if not children:
            break
        parent = children[number % len(children)]
        path.append(parent)
    tokens = [draft.tokens[node] for node in path]
    return Verdict(path, [], 11 + number, committed=[*tokens, 11 + number])


def calibration(here: float, there: float) -> Calibration:
    shares = {"1>1": here, "1>4": there, "4>4": there}
    flat = {
        f"{pair}@{top}": Calibrator((0.0, 1.0), (value, value))
        for pair, value in shares.items()
        for top in (1, 2, 4, 8)
    }
    sources = {name: Calibrator((0.0, 1.0), (value, value)) for name, value in (("sd2:1", here), ("sd2:4", there))}
    return Calibration("any", sources, flat)


@pytest.mark.parametrize(("slow", "deep"), [(1.0, False), (30.0, True)])
def test_the_exit_follows_what_the_target_costs(target_model: Any, draft_model: Any, slow: float, deep: bool) -> None:
    """The same draft, the same probabilities: a dear block pays for a slow target and not for a quick one."""
    drafter = SD2(
        draft_model, [1, 4], top_k=1, calibration=calibration(0.6, 0.8), costs=costs(slow, 0.4), num_draft_tokens=3
    )
    target, some = HFTarget(target_model), rows(2)
    drafter.bind(target)
    traces = [trace for one in generate(target, drafter, some, batch_size=2) for trace in one.traces]
    used = [exit for trace in traces for _, exit in trace.exits]
    assert used, "it drafted"
    assert (used.count(4) > used.count(1)) is deep


def test_nothing_is_drafted_where_drafting_costs_more_than_the_target(target_model: Any, draft_model: Any) -> None:
    drafter = SD2(draft_model, [1, 4], calibration=calibration(0.3, 0.4), costs=costs(1.0, 5.0))
    target = HFTarget(target_model)
    drafter.bind(target)
    traces = [trace for one in generate(target, drafter, rows(2)) for trace in one.traces]
    assert sum(trace.nodes for trace in traces) == 0


def test_one_confident_node_takes_its_level_out_only_under_the_published_rule() -> None:
    from draftsmith.infer.drafters.exit_choice import Fork, LevelThreshold, Threshold

    forks = [Fork(0, 0.9, 0.8, 1), Fork(0, 0.5, 0.2, 1), Fork(1, 0.9, 0.3, 1)]
    assert Threshold([0.5, 0.0]).deeper(0, [], forks, None) == [False, True, True]
    assert LevelThreshold([0.5, 0.0]).deeper(0, [], forks, None) == [False, False, True]


def test_one_draft_serves_several_targets_each_by_its_own_calibration(
    folders: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, make_model: Any, shake: Any
) -> None:
    import shutil

    from draftsmith.infer.models.load import load_target

    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "cache"))
    draft = tmp_path / "draft"
    shutil.copytree(folders.same_size_draft, draft)
    first = load_target(folders.target, dtype="float32", device="cpu")
    second = load_target(folders.target, dtype="float32", device="cpu")
    second.model = shake(second.model, 0.01)
    assert first.fingerprint() != second.fingerprint()
    for target, value in ((first, 0.9), (second, 0.1)):
        fingerprint = target.fingerprint()
        known = calibration(value, value)
        one = Calibration(fingerprint, {"sd2:1": known.curves["sd2:1"], "sd2:2": known.curves["sd2:4"]})
        BandedCalibration.of(one).save(calibration_path(str(draft), fingerprint))
    drafter = SD2(str(draft), exits=[1, 2], dtype="float32", device="cpu")
    for target, value in ((first, 0.9), (second, 0.1)):
        drafter.bind(target)
        known = Policy.of(target, drafter).calibration(rows(1)[0])
        assert known is not None
        assert known.of("sd2:1", 0)(0.5) == value


def test_uncalibrated_use_works_and_says_so_once(
    target_model: Any, draft_model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    drafter = SD2(draft_model, [1, 4])
    target = HFTarget(target_model)
    with caplog.at_level(logging.WARNING):
        drafter.bind(target)
        generate(target, drafter, rows(2))
    assert [record for record in caplog.records if "calibrate" in record.message] == caplog.records
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "names no sorted_exits"),
        ({"exits": [2, 1, 4]}, "must rise"),
        ({"exits": [1, 2]}, "must rise and end with the draft's 4 layers"),
        ({"exits": [1, 4], "selection": "fixed"}, "selection=fixed, which needs it"),
        ({"exits": [1, 4], "exit": 1}, "belongs to selection=fixed"),
        ({"exits": [1, 4], "selection": "fixed", "exit": 3}, "exit 3 is none of this draft's exits"),
        ({"exits": [1, 4], "selection": "threshold", "thresholds": [0.5]}, "1 thresholds for 2 exits"),
        ({"exits": [1, 4], "thresholds": [0.5, 0]}, "takes no thresholds"),
        ({"exits": [1, 4], "selection": "best"}, "unknown selection 'best'"),
        ({"exits": [1, 4], "top_k": 0}, "top_k must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(draft_model: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SD2(draft_model, **changes)
