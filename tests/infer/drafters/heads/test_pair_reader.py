"""Heads over pairs: their caches, and what wrong wiring costs them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from decoded import accepted_length
from joining import admit, release
from planted import plant
from tiny_eagle import (
    fitted_eagle,
    lent,
    states_of,
    tiny_eagle,
)
from tiny_families import tiny_family
from tiny_models import tiny_model

from draftsmith.infer.contract.draft import Draft
from draftsmith.infer.contract.protocols import Budget, Feedback
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.drafters import Eagle, Mixed
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.drafters.draft_reader import DraftOutput
from draftsmith.infer.drafters.heads import pair_reader
from draftsmith.infer.drafters.heads.pair_reader import PairReader
from draftsmith.infer.drafters.lm_drafter import LMDrafter
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.engine.step import step
from draftsmith.infer.heads.eagle import EagleHead
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.runner.entries import Entries
from draftsmith.infer.models.runner.masks import MaskPlan
from draftsmith.infer.models.runner.model_runner import ModelRunner
from draftsmith.retrieval import PromptLookup

TREE = {"num_draft_tokens": 4, "top_k": 3, "nodes": 10, "width": 3, "min_confidence": 0.0, "sample": False}
DEEP = {"top_k": 1, "num_draft_tokens": 5, "min_confidence": 0.0}


def make_rows(vocab: int = 61, count: int = 6) -> list[Row]:
    generator = torch.Generator().manual_seed(7)
    rows = []
    for i in range(count):
        ids = torch.randint(3, vocab, (5 + 4 * i,), generator=generator).tolist()
        rows.append(Row(str(i), ids + ids[: len(ids) // 2], stops=Stops(26 - 2 * i)))
    return rows


@pytest.fixture(scope="module")
def target() -> HFTarget:
    return HFTarget(tiny_model("llama"))


@pytest.fixture(scope="module")
def plain(target: HFTarget) -> list[list[int]]:
    return [one.token_ids for one in generate(target, Empty(), make_rows(), batch_size=6)]


Fit = Callable[..., EagleHead]


@pytest.fixture(scope="module")
def fit(target: HFTarget, plain: list[list[int]]) -> Fit:
    """Makes a head that is right often; once for each design."""
    made: dict[str, EagleHead] = {}
    texts = [row.ids + answer for row, answer in zip(make_rows(), plain)]

    def of(**design: Any) -> EagleHead:
        key = str(design)
        if key not in made:
            made[key] = fitted_eagle(tiny_eagle(**design), target.model, texts, 40)
        return made[key]

    return of


DESIGNS: dict[str, dict[str, Any]] = {
    "version 1": {"version": 1},
    "version 3": {},
    "part of the vocabulary": {"ids": range(4, 61)},
    "normed before and after": {"norm_before_residual": True, "norm_output": True, "norm_before_fc": True},
    "a norm for each state": {"fc_norm": True, "fc_bias": True},
    "two layers": {"layers": 2},
}


@pytest.mark.parametrize("design", DESIGNS)
def test_after_any_verdict_the_cache_is_that_of_a_fresh_run_over_the_true_pairs(
    target: HFTarget, plain: list[list[int]], fit: Fit, design: str
) -> None:
    """Prompts in chunks, drafts accepted in whole, in part and not at all, and a second turn."""
    head = fit(**DESIGNS[design])
    drafter = Eagle(head, **TREE)
    drafter.bind(target)
    engine = Engine(target, drafter, batch_size=3, budget=Budget(10, 4), chunk=7)
    rows = make_rows()
    for row in rows:
        engine.add(row)
    compared, accepted = 0, set[int]()
    while engine.busy:
        for event in engine.step():
            if event.done:
                accepted |= {trace.accepted for trace in event.done.traces}
        compared += sum(assert_fresh(drafter, target.model, row) for row in rows)
    assert [row.new_ids for row in rows] == plain
    assert compared > 20
    assert {0, 1, 2} <= accepted
    again = rows[:1]
    again[0].turn([9, 4, 31, 5])
    engine.add(again[0])
    while engine.busy:
        engine.step()
        assert_fresh(drafter, target.model, again[0])


def assert_fresh(drafter: LMDrafter, model: Any, row: Row) -> int:
    """What the head would draft next, from its cache and from the true pairs alone."""
    reader = drafter.reader
    assert isinstance(reader, PairReader)
    if not reader.can_draft(row):
        return 0
    assert not reader.lm.uncommitted(row)
    ours_V = reader._forward([row], [reader._true(row, len(reader._rows[row].waiting))], [1]).logits_NV[0]
    reader.lm.drop([row])
    torch.testing.assert_close(ours_V, fresh(lent(reader.head, model), model, row.ids)[-1], rtol=1e-9, atol=1e-9)
    return 1


@torch.no_grad()
def fresh(head: Any, model: Any, ids: Sequence[int]) -> torch.Tensor:
    """[T - 1, V] of all true pairs of a text, in one pass."""
    states_TH = head.joined({name: one[:-1] for name, one in states_of(model, head.features, ids).items()})
    runner = ModelRunner(head, MaskPlan())
    runner.open("text")
    pairs = head.pairs(torch.tensor(list(ids[1:])), states_TH)
    return runner.forward(["text"], [Entries(list(ids[1:]), list(range(-1, len(ids) - 2)), pairs)]).logits_NV


def test_the_distributions_ahead_are_those_of_steps_that_start_there(
    target: HFTarget, plain: list[list[int]], fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_reader, "AHEAD_CHUNK", 7)
    drafter = Eagle(fit(**DESIGNS["part of the vocabulary"]), **TREE)
    drafter.bind(target)
    reader, ids = drafter.reader, make_rows()[2].ids + plain[2]
    assert isinstance(reader, PairReader)
    start, depth, seen = 5, 3, 0
    for steps in reader.ahead(ids, start, depth):
        for n in range(len(steps[0])):
            for ours_V, theirs_V in zip(
                [one[n] for one in steps if n < len(one)], stepwise(reader, target, ids, start + n, depth)
            ):
                torch.testing.assert_close(ours_V, theirs_V, rtol=1e-9, atol=1e-9)
                seen += 1
        start += len(steps[0])
    assert start == len(ids) - 1
    assert seen >= depth * (len(ids) - 5 - depth)
    first, *_ = reader.ahead(ids, 0, depth)
    assert bool(torch.isneginf(first[0]).all()), "no state before the first token"
    assert not reader.lm._rows
    assert not target._features


def stepwise(reader: PairReader, target: HFTarget, ids: list[int], position: int, depth: int) -> list[torch.Tensor]:
    """[V] of each depth of a step after `position`, which drafts the text."""
    row, draft = Row("step", ids[: position + 1]), Draft().chain(ids[position + 1 :][:depth], "text")
    reader.open(row, len(draft))
    features = {name: one[:-1] for name, one in states_of(target.model, reader.features, row.ids).items()}
    reader.take([row], [Feedback(0, position, features)])
    reader.begin([row])
    nodes = range(-1, len(draft) - 1)
    found = [reader.run([row], [[node]], [draft], [[1.0]], None).over(61)[0] for node in nodes]
    reader.close(row)
    return found


def run(target: HFTarget, head: EagleHead, **shape: Any) -> list[Generation]:
    drafter = Eagle(head, **{**TREE, **shape})
    drafter.bind(target)
    return generate(target, drafter, make_rows(), batch_size=3)


def test_layer_ids_one_off_are_seen_in_the_accepted_length(target: HFTarget, plain: Any, fit: Fit) -> None:
    head = fit(features=("layer:2",))
    sound = run(target, head)
    wrong = copy.deepcopy(head)
    wrong.design = replace(head.design, features=("layer:1",))
    faulty = run(target, wrong)
    assert [one.token_ids for one in sound] == [one.token_ids for one in faulty] == plain
    assert accepted_length(faulty) < 0.85 * accepted_length(sound)


@pytest.fixture
def swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, EagleHead, "pairs", "[embedded_NH, states_NH]", "[states_NH, embedded_NH]")


@pytest.fixture
def unmapped(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, DraftOutput, "best", "self.ids_V[top_NK.indices]", "top_NK.indices")


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepted nodes stay as they were drafted, and the target's own states are not used for them."""

    def keep(self: PairReader, rows: Any, verdicts: Any, feedback: Any) -> None:
        paths = []
        for row, verdict in zip(rows, verdicts):
            draft = self._rows[row].draft
            paths.append([*range(draft.pending), *draft.accepted(verdict)] if self.lm.uncommitted(row) else [])
        pending = [self._rows[row].draft.pending if path else 0 for row, path in zip(rows, paths)]
        self.lm.commit(rows, paths)
        for row, count in zip(rows, pending):
            self._rows[row].ran(count)
            self._rows[row].forget()
        self.take(rows, feedback)
        for row, path, count in zip(rows, paths, pending):
            self._rows[row].ran(len(path) - count)

    monkeypatch.setattr(PairReader, "keep", keep)


@pytest.mark.parametrize("fault", ["swapped", "unmapped", "kept"])
def test_planted_faults_are_seen_in_the_accepted_length(
    target: HFTarget, plain: Any, fit: Fit, fault: str, request: pytest.FixtureRequest
) -> None:
    head = fit(**DESIGNS["part of the vocabulary"])
    sound = run(target, head)
    request.getfixturevalue(fault)
    faulty = run(target, head)
    assert [one.token_ids for one in sound] == [one.token_ids for one in faulty] == plain
    assert accepted_length(faulty) < (0.97 if fault == "kept" else 0.8) * accepted_length(sound)


def test_a_target_that_reads_accepted_tokens_late_is_drafted_for_when_their_states_are_known() -> None:
    model = tiny_family("qwen3_next")
    target = HFTarget(model)
    config = model.config.get_text_config()
    rows = lambda: make_rows(vocab=config.vocab_size, count=3)  # noqa: E731
    wanted = [one.token_ids for one in generate(target, Empty(), rows(), batch_size=3)]
    texts = [row.ids + answer for row, answer in zip(rows(), wanted)]
    weight = next(model.parameters())
    head = tiny_eagle(
        config.hidden_size, config.hidden_size, config.vocab_size, features=("layer:0", "layer:1", "last")
    )
    head = fitted_eagle(head.to(weight.dtype), model, texts, 30)
    drafter = Eagle(head, **TREE)
    drafter.bind(target)
    found = generate(target, drafter, rows(), batch_size=2)
    assert [one.token_ids for one in found] == wanted
    traces = [trace for one in found for trace in one.traces]
    assert max(trace.accepted for trace in traces) >= 2
    assert any(0 < trace.accepted < trace.nodes for trace in traces)


def test_a_mix_of_a_head_and_prompt_lookup_drafts_with_both(target: HFTarget, plain: Any, fit: Fit) -> None:
    """The head is asked below leaves of the other in the same round as for the root, which takes a pass a level."""
    drafter = Mixed([Eagle(fit(), **TREE), PromptLookup()])
    drafter.bind(target)
    assert set(drafter.features) == {"layer:0", "layer:1", "layer:2"}
    found = generate(target, drafter, make_rows(), batch_size=3)
    assert [one.token_ids for one in found] == plain
    sources = {source for one in found for trace in one.traces for source in trace.committed_sources}
    assert {"eagle", "pld"} <= sources
    assert max(trace.accepted for one in found for trace in one.traces) >= 2


def test_a_head_of_a_prompt_that_is_not_read_keeps_what_it_joins_and_no_more(target: HFTarget) -> None:
    """The states of the named layers pass through in chunks."""
    prompt = 4096
    model = tiny_model("llama", max_position_embeddings=8192, dtype=torch.float32)
    head = tiny_eagle(features=("layer:0", "layer:1")).float()
    head.config.max_position_embeddings = 8192
    drafter = Eagle(head, costs=DEAR, **TREE)
    long = HFTarget(model)
    drafter.bind(long)
    drafter._pays = False
    seen: list[int] = []
    inner = drafter.read

    def counting(rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        for one in feedback:
            assert set(one.features) == {"layer:0", "layer:1"}
            seen.append(sum(state.untyped_storage().nbytes() for state in one.features.values()))
        inner(rows, feedback)

    drafter.read = counting  # type: ignore[method-assign]
    row = Row("long", [(7 * i) % 58 + 3 for i in range(prompt)], stops=Stops(6))
    engine = Engine(long, drafter, chunk=512)
    engine.add(row)
    reader = drafter.reader
    assert isinstance(reader, PairReader)
    most = 0
    while engine.busy:
        engine.step()
        if row in reader._rows:
            most = max(most, reader._rows[row].waiting.untyped_storage().nbytes())
    assert sum(seen) == prompt * 2 * 32 * 4
    assert max(seen) == 512 * 2 * 32 * 4
    assert (prompt - 1) * 32 * 4 <= most <= len(row.ids) * 32 * 4


DEAR = Costs({"target": PassCost((1, 64), (1.0, 2.0)), "eagle": PassCost((1, 64), (50.0, 100.0))})


def test_a_draft_that_is_made_again_is_the_same(target: HFTarget, fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an earlier one left behind, finished or broken off in one of its passes."""
    made: list[list[Any]] = []
    for disturbed in (False, True):
        drafter, rows = Eagle(fit(), **TREE), make_rows()
        drafter.bind(target)
        admit(target, drafter, rows)
        made.append([])
        budgets = [Budget(10, 4)] * len(rows)
        for number in range(4):
            if disturbed:
                with monkeypatch.context() as broken:
                    break_pass(broken, drafter.reader, number % 3)
                    with pytest.raises(KeyboardInterrupt):
                        drafter.propose(rows, budgets)
                drafter.abandon(rows)
                drafter.propose(rows, budgets)
                drafter.abandon(rows)
            drafts = drafter.propose(rows, budgets)
            made[-1].append([(draft.tokens, draft.parents) for draft in drafts])
            drafter.abandon(rows)
            step(target, drafter, rows, Budget(10, 4))
        release(target, drafter, rows)
    assert made[0] == made[1]
    assert sum(len(tokens) for drafts in made[0] for tokens, _ in drafts) > 100


def break_pass(monkeypatch: pytest.MonkeyPatch, reader: Any, number: int) -> None:
    """After this many passes, one is interrupted when its entries are there already."""
    begin, calls = reader.lm.cache.begin, []

    def broken(*args: Any) -> None:
        calls.append(1)
        if len(calls) > number:
            raise KeyboardInterrupt
        begin(*args)

    monkeypatch.setattr(reader.lm.cache, "begin", broken)


def test_states_that_were_lost_end_the_drafts_of_their_row_only(
    target: HFTarget, plain: Any, fit: Fit, caplog: pytest.LogCaptureFixture
) -> None:
    drafter = Eagle(fit(), **TREE)
    drafter.bind(target)
    inner, calls = drafter.observe, []

    def losing(rows: Sequence[Row], verdicts: Any, feedback: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            some = [i for i, row in enumerate(rows) if row.key != "0"]
            drafter.abandon([row for row in rows if row.key == "0"])
            rows, verdicts, feedback = ([each[i] for i in some] for each in (rows, verdicts, feedback))
        inner(rows, verdicts, feedback)

    drafter.observe = losing  # type: ignore[method-assign]
    found = generate(target, drafter, make_rows(), batch_size=3)
    assert [one.token_ids for one in found] == plain
    assert not any(trace.nodes for trace in found[0].traces[4:])
    assert all(any(trace.accepted for trace in one.traces[4:]) for one in found[1:])
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning == "row 0 lost states of the target in an interrupted step: not drafted any more"
