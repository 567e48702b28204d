"""Only what pays is drafted and verified, whatever the drafter; a useless drafter costs next to nothing."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.infer.contract.draft import ROOT, Draft, Group
from draftsmith.infer.contract.protocols import Verdict
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.costs.calibration import BandedCalibration, Calibration, calibration_path, costs_path
from draftsmith.infer.costs.calibrator import Calibrator
from draftsmith.infer.costs.identity import TargetIdentity, machine
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.drafters import SmallLM
from draftsmith.infer.drafters.controls import Empty, adversary, oracle
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.files.atomic import write_json
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.recorded_target import RecordedTarget
from draftsmith.retrieval import PromptLookup

VOCAB, LENGTH = 100, 300


def costs_of(per_node: float, **draft: float) -> Costs:
    """A target whose pass takes one second for a token, and `per_node` more for each further one."""
    passes = {name: PassCost((1, 201), (seconds, 1.1 * seconds)) for name, seconds in draft.items()}
    return Costs({"target": PassCost((1, 201), (1.0, 1.0 + 200 * per_node)), **passes})


def policy_of(per_node: float, **curves: float) -> Policy:
    known = {source: Calibrator((0.5,), (value,)) for source, value in curves.items()}
    return Policy(costs_of(per_node), BandedCalibration.of(Calibration("t", known)) if known else None)


def modelled(generations: Sequence[Generation], costs: Costs) -> float:
    """Seconds of all steps, by the costs that the policy spends."""
    steps: dict[int, list[Any]] = defaultdict(list)
    for generation in generations:
        for trace in generation.traces:
            steps[trace.step].append(trace)
    return sum(
        costs.of("target")(
            sum(1 + trace.nodes for trace in some),
            sum(trace.context for trace in some),
            sum((1 + trace.nodes) * trace.context for trace in some),
        )
        for some in steps.values()
    )


def answers_of(rows: int, length: int = LENGTH, seed: int = 0) -> dict[str, list[int]]:
    draw = random.Random(seed)
    return {str(i): [draw.randrange(VOCAB) for _ in range(length)] for i in range(rows)}


def decode(
    drafter: Any, answers: dict[str, list[int]], batch_size: int, policy: Policy | None = None
) -> list[Generation]:
    target = RecordedTarget(answers, VOCAB)
    drafter.bind(target)
    if hasattr(drafter, "learn"):
        drafter.learn(answers)
    rows = [Row(key, [1, 2, 3], Settings(), Stops(len(answer))) for key, answer in answers.items()]
    done = generate(target, drafter, rows, batch_size=batch_size, policy=policy)
    assert [one.token_ids for one in done] == list(answers.values())
    return done


def nodes(generations: Sequence[Generation]) -> int:
    return sum(trace.nodes for generation in generations for trace in generation.traces)


# what is cut


@settings(max_examples=200, deadline=None)
@given(shape=st.lists(st.tuples(st.integers(-1, 30), st.floats(0, 1)), max_size=30), per_node=st.floats(0.001, 0.9))
def test_what_is_cut_is_worth_less_than_what_it_costs_and_what_stays_is_a_tree(
    shape: list[tuple[int, float]], per_node: float
) -> None:
    draft = Draft()
    for token, (parent, confidence) in enumerate(shape):
        draft.outright(min(parent, token - 1), token, "s", confidence)
    policy, row = policy_of(per_node), Row("0", [5] * 10)
    policy.begin([row])
    (kept,) = policy.cut([row], [draft])
    kept.check(1000)
    reach = {-1: 1.0}
    for parent in range(-1, len(draft)):
        for trial in draft.trials.get(parent, ()):
            reach[trial.node] = reach[parent] * trial.confidence
    for node, token in enumerate(draft.tokens):
        sure = reach[node] > per_node * 1.001
        assert not sure or token in kept.tokens, "a node worth its seconds was cut"
    assert sum(reach[draft.tokens.index(token)] for token in kept.tokens) >= len(kept) * per_node * 0.999
    assert kept.tokens == sorted(kept.tokens), "nodes keep their order"
    above = [-1 if parent == ROOT else draft.tokens[parent] for parent in draft.parents]
    assert [-1 if parent == ROOT else kept.tokens[parent] for parent in kept.parents] == [
        above[token] for token in kept.tokens
    ]


def test_every_row_gets_the_nodes_that_pay_and_no_row_pays_for_another() -> None:
    wide, narrow, poor = Draft(), Draft().chain([1, 2], "s", [0.9, 0.1]), Draft().chain([1], "s", [0.05])
    for token in range(4):
        wide.outright(ROOT, token, "s", 0.24)
    policy, rows = policy_of(0.1), [Row(str(i), [5] * 10) for i in range(3)]
    policy.begin(rows)
    # Three tokens take 1.2 s, 0.4 s each: a node pays from a reach of 0.25 on.
    assert [len(draft) for draft in policy.cut(rows, [wide, narrow, poor])] == [0, 1, 0]
    policy = policy_of(0.05)
    policy.begin(rows)
    # Here from 0.14 on.
    assert [len(draft) for draft in policy.cut(rows, [wide, narrow, poor])] == [4, 1, 0]


def test_a_drawn_draft_is_never_cut_and_without_costs_nothing_is() -> None:
    import torch

    drawn, chain = Draft(), Draft().chain([1, 2], "s", [1e-6, 1e-6])
    drawn.sampled(ROOT, 3, Group(torch.full((5,), 0.2)), "s", 1e-9)
    rows = [Row(str(i), [5] * 10) for i in range(2)]
    policy = policy_of(0.5)
    policy.begin(rows)
    assert [len(draft) for draft in policy.cut(rows, [drawn, chain])] == [1, 0]
    policy = Policy()
    policy.begin(rows)
    assert [len(draft) for draft in policy.cut(rows, [drawn, chain])] == [1, 2]
    policy.settle(rows, [drawn, chain], [Verdict([], [], 4, committed=[4])] * 2)
    policy.close(rows)


# a useless drafter


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("per_node", [0.01, 0.05, 0.2, 0.5, 0.9])
def test_a_drafter_that_is_always_wrong_and_sure_costs_next_to_nothing(per_node: float, batch_size: int) -> None:
    answers, costs = answers_of(batch_size), costs_of(per_node)
    plain = modelled(decode(Empty(), answers, batch_size, Policy(costs)), costs)
    unlimited = modelled(decode(adversary(), answers, batch_size, Policy()), costs)
    priced = decode(adversary(), answers, batch_size, Policy(costs))
    assert unlimited > 1.05 * plain
    assert modelled(priced, costs) < 1.05 * plain
    drafted = [trace.nodes > 0 for trace in priced[0].traces]
    if per_node <= 0.2:  # else only a node that is nearly certain would pay, and that is asked seldom
        assert any(drafted[100:]), "it is tried again"
    assert not all(drafted[100:]) or per_node < 0.05


@pytest.mark.parametrize("per_node", [0.05, 0.3])
def test_a_drafter_that_is_always_right_stays_in_use(per_node: float) -> None:
    answers, costs = answers_of(2), costs_of(per_node)
    plain = modelled(decode(Empty(), answers, 2, Policy(costs)), costs)
    policy = Policy(costs)
    assert modelled(decode(oracle(), answers, 2, policy), costs) < 0.8 * plain
    assert not policy._alone


class Changing:
    """A user's own drafter: propose, and what the protocol asks for. Wrong in the first half of the text."""

    name, features, origin = "changing", (), ""
    forward_seconds, bytes_moved = 0.0, 0

    def __init__(self, answers: dict[str, list[int]]) -> None:
        self.answers = answers

    def pass_timers(self) -> dict[str, Any]:
        return {}

    def bind(self, target: Any) -> None:
        pass

    def open(self, rows: Any) -> None:
        pass

    def read(self, rows: Any, feedback: Any) -> None:
        pass

    def abandon(self, rows: Any) -> None:
        pass

    def close(self, rows: Any) -> None:
        pass

    def observe(self, rows: Any, verdicts: Any, feedback: Any) -> None:
        pass

    def propose(self, rows: Any, budgets: Any, policy: Any = None) -> list[Draft]:
        drafts = []
        for row, budget in zip(rows, budgets):
            answer, done = self.answers[row.key], len(row.new_ids)
            shift = 1 if done < len(answer) // 2 else 0
            ahead = answer[done : done + min(4, budget.depth)]
            drafts.append(Draft().chain([(token + shift) % VOCAB for token in ahead], self.name))
        return drafts


def test_a_users_own_drafter_is_priced_and_a_text_that_changes_is_noticed() -> None:
    answers, costs = answers_of(1, 400), costs_of(0.2)
    (done,) = decode(Changing(answers), answers, 1, Policy(costs))
    before = [trace for trace in done.traces if trace.context < 3 + 200]
    after = [trace for trace in done.traces if trace.context >= 3 + 240]
    assert sum(trace.nodes for trace in before) < 0.2 * len(before), "wrong ones are left out"
    assert sum(trace.accepted for trace in after) > 2 * len(after), "right ones are found again"


def test_decisions_are_reproducible() -> None:
    answers, costs = answers_of(3), costs_of(0.1)
    first, second = (decode(Changing(answers), answers, 2, Policy(costs)) for _ in range(2))
    assert [[trace.nodes for trace in one.traces] for one in first] == [
        [trace.nodes for trace in one.traces] for one in second
    ]


# pld


def repeating(rows: int, share: float, length: int = LENGTH, seed: int = 1) -> dict[str, list[int]]:
    """Texts over few tokens, so that n-grams match; a `share` of the tokens follows from the one before."""
    draw = random.Random(seed)
    found: dict[str, list[int]] = {}
    for i in range(rows):
        ids = [draw.randrange(12)]
        while len(ids) < length:
            ids.append((ids[-1] * 5 + 1) % 12 if draw.random() < share else draw.randrange(12))
        found[str(i)] = ids
    return found


def test_pld_at_batch_8_is_never_slower_than_plain_decoding_for_long() -> None:
    answers = repeating(8, 0.3)
    costs = costs_of(0.6)
    plain = modelled(decode(Empty(), answers, 8, Policy(costs)), costs)
    assert modelled(decode(PromptLookup(), answers, 8, Policy()), costs) > 1.5 * plain, "unlimited it is far slower"
    assert modelled(decode(PromptLookup(), answers, 8, Policy(costs)), costs) < 1.05 * plain


def test_pld_at_batch_8_drafts_where_it_pays() -> None:
    answers = repeating(8, 0.97)
    costs = costs_of(0.05)
    plain = modelled(decode(Empty(), answers, 8, Policy(costs)), costs)
    done = decode(PromptLookup(), answers, 8, Policy(costs))
    assert modelled(done, costs) < 0.7 * plain
    assert len({trace.nodes for one in done for trace in one.traces}) > 3, "each row has its own number of nodes"


@pytest.mark.parametrize(("curve", "drafts"), [(0.01, False), (0.9, True)])
def test_the_curves_that_were_measured_for_pld_are_read(curve: float, drafts: bool) -> None:
    answers = repeating(1, 0.8, 40)
    done = decode(PromptLookup(), answers, 1, policy_of(0.3, pld=curve))
    assert bool(nodes(done)) is drafts


def test_every_row_is_read_by_the_curves_of_its_own_temperature() -> None:
    sure, unsure = Calibrator((0.5,), (0.9,)), Calibrator((0.5,), (0.02,))
    known = BandedCalibration.of(Calibration("t", {"s": sure}), Calibration("t", {"s": unsure}, temperature=1.0))
    policy = Policy(costs_of(0.1), known)
    rows = [Row("0", [5] * 10), Row("1", [5] * 10, Settings(temperature=1.0)), Row("2", [5] * 10, Settings(0.7))]
    policy.begin(rows)
    drafts = [Draft().chain([1, 2], "s", [0.5, 0.5]) for _ in rows]
    assert [len(draft) for draft in policy.cut(rows, drafts)] == [2, 0, 0]


def test_rows_without_outright_candidates_ask_for_no_curves(caplog: pytest.LogCaptureFixture) -> None:
    """As of a drafter that draws for rows with a temperature, and was calibrated for others only."""
    policy = policy_of(0.1, s=0.9)
    row = Row("0", [5] * 10, Settings(temperature=0.8))
    policy.begin([row])
    assert [len(draft) for draft in policy.cut([row], [Draft()])] == [0]
    policy.settle([row], [Draft()], [Verdict([], [], 3, committed=[3])])
    assert not caplog.records
    policy.begin([row])
    policy.cut([row], [Draft().chain([1], "s", [0.5])])
    assert "no calibration was measured at temperature 0.8" in caplog.text


# where calibration and costs come from


def test_files_are_found_by_what_the_drafter_was_made_from(
    make_model: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "cache"))
    target = HFTarget(make_model("llama"))
    assert Policy.of(target, PromptLookup()).costs is None
    weight = next(target.model.parameters())
    costs = Costs(costs_of(0.1).passes, 0.0, machine(weight.device, weight.dtype), TargetIdentity.of("t", target))
    write_json(costs_path("pld", target), costs.to_json())
    curves = Calibration(target.fingerprint(), {"pld": Calibrator((0.5,), (0.4,))})
    BandedCalibration.of(curves).save(calibration_path("pld", target.fingerprint()))
    row = Row("0", [5])
    policy = Policy.of(target, PromptLookup())
    assert policy.costs is not None
    assert policy.calibration(row) == curves
    for off in (PromptLookup(calibration="none", costs="none"), PromptLookup()):
        given = {} if off.costs == "none" else {"calibration": "none", "costs": "none"}
        policy = Policy.of(target, off, **given)
        assert policy.costs is None
        assert policy.calibration(row) is None
    own = Changing({})
    assert Policy.of(target, own).costs is None
    own.costs = costs  # type: ignore[attr-defined]
    assert Policy.of(target, own).costs is costs


def test_a_draft_model_that_was_not_loaded_by_name_finds_no_files_of_another(
    make_model: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "cache"))
    target = HFTarget(make_model("llama"))
    curves = Calibration(target.fingerprint(), {"small": Calibrator((0.5,), (0.4,))})
    BandedCalibration.of(curves).save(calibration_path("small", target.fingerprint()))
    assert Policy.of(target, SmallLM(make_model("llama"))).calibrations is None


# draft models


def test_a_draft_model_that_is_always_wrong_is_soon_left_alone(make_model: Any) -> None:
    """It is sure of what the target never says; its pass costs a third of the target's."""
    model, wrong = make_model("llama"), make_model("llama", seed=5)
    wrong.lm_head.weight.data[:] *= 40
    target, costs = HFTarget(model), costs_of(0.01, small=0.33)
    drafter = SmallLM(wrong, costs=costs, top_k=1)
    drafter.bind(target)
    (done,) = generate(target, drafter, [Row("0", [5, 9, 3], Settings(), Stops(150))])
    confidences = [tried.confidence for trace in done.traces for tried in trace.tried]
    assert sum(confidences) > 0.8 * len(confidences), "it was sure"
    assert sum(trace.accepted for trace in done.traces) < 0.2 * len(confidences)
    late = [trace for trace in done.traces if trace.context > 53]
    assert sum(trace.nodes > 0 for trace in late) < 0.15 * len(late)
