"""A mix: one tree from several drafters, each with its own verdict, its own cache, and its own grades."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from decoded import assert_tried_hard
from planted import plant

from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.protocols import Budget, Feedback, LearnsAnswers, Verdict
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.contract.trace import StepTrace
from draftsmith.infer.costs.calibration import Calibration
from draftsmith.infer.costs.calibrator import Calibrator
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.drafters import Mixed, Recycling, SmallLM
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.drafters.lm_drafter import LMDrafter
from draftsmith.infer.drafters.mixed import mixed as mixing
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.retrieval import PromptLookup, Rest

# Noise is right more often than it thinks.
SURER = Calibration("any", {"small": Calibrator((0.0, 0.1, 1.0), (0.05, 0.7, 0.95))})
COSTS = Costs({"target": PassCost((1, 16), (1.0, 1.5)), "small": PassCost((1, 16), (0.02, 0.04))})


class Continues(Empty):
    """Proposes a chain of what `ahead` gives for the row's text, without a draft model."""

    def __init__(self, name: str, ahead: Callable[[Sequence[int]], list[int]], confidence: float = 0.5) -> None:
        self.name = name
        self.ahead = ahead
        self.confidence = confidence
        self.graded: list[Verdict] = []

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget], policy: Any = None) -> list[Draft]:
        drafts = []
        for row, budget in zip(rows, budgets):
            tokens = self.ahead(row.ids)[: min(budget.depth, budget.nodes)]
            drafts.append(Draft().chain(tokens, self.name, [self.confidence] * len(tokens)))
        return drafts

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        self.graded += verdicts


class Hidden:
    """A draft model that cannot be asked leaf by leaf, as a user's own drafter: its whole drafts are merged."""

    def __init__(self, inner: LMDrafter) -> None:
        self.inner = inner
        self.name, self.origin, self.features = "hidden", "", ()

    def __getattr__(self, name: str) -> Any:
        if name in ("expansion", "width", "draws", "add_document", "learns", "add_answer"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def pass_timers(self) -> dict[str, Any]:
        return {}


def rows(count: int = 3, new: int = 24, settings: Settings | None = None) -> list[Row]:
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, 61, (11 + 7 * i,), generator=generator).tolist() for i in range(count)]
    return [Row(str(i), ids + ids[: 3 + i], settings or Settings(), Stops(new)) for i, ids in enumerate(prompts)]


@pytest.fixture(scope="module")
def model(make_model: Any) -> Any:
    return make_model("llama")


def small(model: Any, shake: Any, **arguments: Any) -> LMDrafter:
    arguments = {"num_draft_tokens": 4, "top_k": 3, "nodes": 10, "min_confidence": 0.02, **arguments}
    return SmallLM(shake(model, 0.06), **arguments)


def run(model: Any, drafter: Any, batch_size: int = 3, **arguments: Any) -> list[StepTrace]:
    target = HFTarget(model)
    drafter.bind(target)
    with Engine(target, drafter, batch_size=batch_size) as engine:
        done = engine.run(rows(**arguments), strict=True)
    return [trace for one in done for trace in one.traces]


def trees(model: Any, drafter: Any, monkeypatch: pytest.MonkeyPatch, costs: Costs | None = None) -> list[Any]:
    """Every draft that is made while decoding, as tokens and parents."""
    found: list[Any] = []
    if costs is not None:
        lm = drafter.drafters[1] if isinstance(drafter, Mixed) else drafter
        lm.costs, lm.calibration = costs, SURER
    whole = drafter.propose

    def propose(*arguments: Any) -> list[Draft]:
        drafts: list[Draft] = whole(*arguments)
        found.extend((draft.tokens, draft.parents) for draft in drafts)
        return drafts

    monkeypatch.setattr(drafter, "propose", propose)
    run(model, drafter)
    return found


@pytest.mark.parametrize("costs", [None, COSTS], ids=["limits", "costs"])
def test_a_silent_source_changes_nothing(
    model: Any, shake: Any, monkeypatch: pytest.MonkeyPatch, costs: Costs | None
) -> None:
    alone = trees(model, small(model, shake), monkeypatch, costs)
    beside = trees(model, Mixed([Empty(), small(model, shake)]), monkeypatch, costs)
    assert beside == alone
    assert max(len(tokens) for tokens, _ in alone) > 4


def test_the_better_source_of_each_place_is_in_the_tree(model: Any, shake: Any) -> None:
    """One source is right at two of four positions and the other at the other two: together they never stop."""
    target = HFTarget(model)
    with Engine(target) as engine:
        answers = [row.ids + done.token_ids for row, done in zip(rows(), engine.run(rows()))]

    def ahead(parity: int) -> Callable[[Sequence[int]], list[int]]:
        def follow(ids: Sequence[int]) -> list[int]:
            (whole,) = [answer for answer in answers if answer[: len(ids)] == list(ids)]
            wrong = [token if at // 2 % 2 == parity else (token + 1) % 61 for at, token in enumerate(whole)]
            return wrong[len(ids) :][:1]

        return follow

    lengths = {}
    for name, drafter in {
        "first": Continues("first", ahead(0)),
        "last": Continues("last", ahead(1)),
        "mix": Mixed([Continues("first", ahead(0)), Continues("last", ahead(1))], nodes=2),
    }.items():
        traces = run(model, drafter)
        lengths[name] = sum(trace.committed for trace in traces) / len(traces)
    # The most that two tokens a step can give 24, behind a first step that drafts nothing.
    assert lengths["mix"] == 24 / 13
    assert max(lengths["first"], lengths["last"]) < 1.8


def test_equal_nodes_go_to_the_surer_source(model: Any, shake: Any) -> None:
    single = run(model, small(model, shake, nodes=6), count=6, new=40)
    mixed = run(model, Mixed([PromptLookup(), small(model, shake)], nodes=6), count=6, new=40)
    assert max(trace.nodes for trace in mixed) <= 6
    lengths = [sum(trace.committed for trace in traces) / len(traces) for traces in (single, mixed)]
    assert lengths[1] > lengths[0]


def test_every_draft_cache_is_a_fresh_pass_over_the_committed_tokens(model: Any, shake: Any) -> None:
    """Also of a draft model whose whole drafts are merged, and of leaves that another source named."""
    check_caches(model, shake)


def test_a_source_that_gets_the_mixed_tree_s_verdict_is_caught(
    model: Any, shake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, mixing.Mixed, "observe", "known.get(number, verdict)", "verdict")
    with pytest.raises(AssertionError, match="not close"):
        check_caches(model, shake)


def check_caches(model: Any, shake: Any) -> None:
    hidden = small(model, shake, num_draft_tokens=3, width=2)
    asked = SmallLM(shake(model, 0.09, 4), num_draft_tokens=4, top_k=3, nodes=10, min_confidence=0.02)
    mix = Mixed([PromptLookup(), Hidden(hidden), asked])
    target = HFTarget(model)
    mix.bind(target)
    given = rows(new=40)
    with Engine(target, mix, batch_size=3) as engine:
        for row in given:
            engine.add(row, keep=True)
        compared = 0
        while engine.busy:
            engine.step()
            for drafter in (hidden, asked):
                for row in given:
                    if drafter.reader.lm.has(row):
                        compared += assert_fresh(drafter, row)
    assert compared >= 60, "each cache is looked at after every step"


def assert_fresh(drafter: LMDrafter, row: Row) -> int:
    """The next logits from the cache equal those of a pass over all committed tokens."""
    from draftsmith.infer.models.runner.entries import Entries

    length = drafter.reader.lm.length(row)
    if drafter.reader.lm.uncommitted(row) or not length:
        return 0
    output = drafter.reader.lm.forward([row], [Entries.chain(row.ids[length:])])
    drafter.reader.lm.drop([row])
    with torch.inference_mode():
        fresh_V = drafter.model(torch.tensor([row.ids])).logits[0, -1]
    torch.testing.assert_close(output.logits_NV[-1], fresh_V, rtol=1e-9, atol=1e-9)
    return 1


def test_a_source_that_is_never_verified_is_graded(model: Any, shake: Any) -> None:
    """Its confidence is the lowest and the room is taken, so no node is its own; it is right at every step."""
    target = HFTarget(model)
    with Engine(target) as engine:
        answers = [row.ids + done.token_ids for row, done in zip(rows(), engine.run(rows()))]

    def right(ids: Sequence[int]) -> list[int]:
        (whole,) = [answer for answer in answers if answer[: len(ids)] == list(ids)]
        return whole[len(ids) : len(ids) + 1]

    timid = Continues("timid", right, 1e-4)
    loud = Continues("loud", lambda ids: [ids[-1]], 0.9)
    mix = Mixed([loud, timid], nodes=1)
    before = mixing.Pool(2).weights_F
    _, first, *_ = run(model, mix, batch_size=1, count=1, new=1 + 2)
    assert first.nodes_by_source == {"loud": 1}
    assert timid.graded[0].tried[0].source == "timid"
    assert timid.graded[0].tried[0].accepted
    after = mix._learned["greedy"].pool.weights_F
    assert after[5] > before[5], "the timid one's own word counts for more"
    assert after[0] < before[0] or before[0] == after[0]
    later = run(model, mix, batch_size=1, count=1, new=24)
    assert sum(trace.accepted for trace in later) > 8, "it was believed after a while"


def test_the_first_namer_is_credited_and_the_others_are_recorded(model: Any) -> None:
    same = [Continues(name, lambda ids: [ids[-1], 7], sure) for name, sure in (("a", 0.5), ("b", 0.6))]
    mix = Mixed(same)
    mix.bind(HFTarget(model))
    (row,) = rows(1)
    mix.open([row])
    (draft,) = mix.propose([row], [Budget(8, 8)])
    assert draft.tokens == [row.ids[-1], 7]
    assert [trial.source for node in (ROOT, 0) for trial in draft.trials[node]] == ["b", "b"]
    assert draft.also == {0: ("a",), 1: ("a",)}


def test_own_verdict_follows_the_committed_text_through_a_draft() -> None:
    draft = Draft()
    wrong = draft.outright(ROOT, 9, "s", 0.2)
    right = draft.outright(ROOT, 4, "s", 0.7)
    draft.outright(wrong, 5, "s", 0.5)
    next_one = draft.outright(right, 5, "s", 0.6)
    draft.outright(next_one, 6, "s", 0.6)
    own = mixing.own_verdict(draft, Verdict([7], [], 6, committed=[4, 5, 6]))
    assert own.path == [right, next_one]
    assert [trial.node for trial in own.accepted] == [right, next_one]
    assert [(one.depth, one.accepted) for one in own.tried] == [(1, False), (1, True), (2, True), (3, True)]
    assert mixing.own_verdict(draft, Verdict([], [], 8, committed=[8])).path == []
    assert own.kept_path == [right, next_one]


def test_what_cannot_be_mixed_is_refused(model: Any, shake: Any) -> None:
    pld = PromptLookup()
    for drafters, message in (
        ([pld], "needs at least two drafters, and got 1"),
        ([], "got 0"),
        ([pld, PromptLookup()], "two drafters named 'pld'"),
        ([pld, small(model, shake, sample=True)], "leave out sample=drawn of small"),
        ([Mixed([pld, Empty()]), small(model, shake)], "another mix"),
    ):
        with pytest.raises(ValueError, match=message):
            Mixed(drafters)
    with pytest.raises(ValueError, match="nodes"):
        Mixed([pld, Empty()], nodes=-1)
    drawn = Mixed([pld, Hidden(small(model, shake, sample=True))])
    drawn.bind(HFTarget(model))
    with Engine(HFTarget(model), drawn) as engine:
        (done,) = engine.run(rows(1, settings=Settings(temperature=0.9, seed=1)))
    assert "hidden draws its tokens, so it cannot be part of a mix" in done.error


def test_costs_need_every_draft_model_s_and_calibrations_are_each_its_own(model: Any, shake: Any) -> None:
    cheap = Costs({"target": PassCost((1, 16), (1.0, 1.5))})
    pld, draft = PromptLookup(costs=cheap), small(model, shake)
    mix = Mixed([pld, draft])
    mix.bind(HFTarget(model))
    assert mix.costs == "none"
    draft.costs = COSTS
    mix.bind(HFTarget(model))
    assert mix.costs.passes == COSTS.passes
    assert set(mix.pass_timers()) == {"small"}


@pytest.mark.parametrize(("accepted", "drafts"), [(0.05, False), (0.95, True)])
def test_a_draft_model_begins_in_a_mix_as_it_would_alone(model: Any, shake: Any, accepted: float, drafts: bool) -> None:
    """What calibration measured of it says whether the first pass pays, beside a source that is silent too."""
    curve = Calibrator((0.0, 1.0), (accepted, accepted))
    known = Calibration("any", {"small": curve}, measured={"small": {"first_accepted": accepted}})
    costs = Costs({"target": PassCost((1, 16), (1.0, 1.1)), "small": PassCost((1, 16), (0.6, 0.62))})

    def begun(mixed: bool) -> bool:
        draft = SmallLM(shake(model, 0.02), calibration=known, costs=costs, num_draft_tokens=4)
        drafter = Mixed([Empty(), draft]) if mixed else draft
        drafter.bind(HFTarget(model))
        with Engine(HFTarget(model), drafter, batch_size=1) as engine:
            (done,) = engine.run(rows(1))
        return any(trace.nodes for trace in done.traces)

    assert [begun(mixed=False), begun(mixed=True)] == [drafts, drafts]


def test_a_mix_drafts_before_the_end_of_a_prompt_is_read_if_all_its_drafters_do(model: Any, shake: Any) -> None:
    early = [trace for trace in run(model, Mixed([PromptLookup(), Recycling(nodes=8)])) if trace.read > 1]
    late = [trace for trace in run(model, Mixed([PromptLookup(), small(model, shake)])) if trace.read > 1]
    assert [min(trace.nodes, 1) for trace in early] == [1, 1, 1]
    assert [trace.nodes for trace in late] == [0, 0, 0]


@pytest.mark.parametrize("settings", [Settings(), Settings(0.7, top_k=6)], ids=["greedy", "sampled"])
def test_a_source_that_learns_hears_of_the_answers(model: Any, settings: Settings) -> None:
    """The text stays plain decoding's, and a prompt that comes again is drafted from its answer."""
    target = HFTarget(model)
    plain = [one.token_ids for one in Engine(target, Empty()).run(rows(settings=settings))]
    mix = Mixed([Rest(nodes=8), PromptLookup()])
    mix.bind(target)
    assert isinstance(mix, LearnsAnswers)
    assert mix.learns
    engine = Engine(target, mix, batch_size=2)
    first, second = engine.run(rows(settings=settings)), engine.run(rows(settings=settings))
    assert [one.token_ids for one in first] == [one.token_ids for one in second] == plain
    steps = [sum(len(one.traces) for one in some) for some in (first, second)]
    assert steps[1] < 0.7 * steps[0]
    assert_tried_hard([*first, *second], deep=4)
    still = Mixed([Rest(nodes=8, learn=False), PromptLookup()])
    assert not still.learns
    assert not hasattr(Mixed([Continues("a", lambda ids: []), PromptLookup()]), "learns")
