"""Targets whose state cannot branch decode chains without loss: token-identical to plain decoding and to `generate`.

Every test asserts that its own run accepted deep, rejected, and varied: a run that did none of these shows nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from decoded import assert_tried_hard, decode, tokens
from planted import plant
from tiny_families import plain_answer, tiny_family

from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.protocols import Budget
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.drafters import Lookahead, Recycling, SmallLM
from draftsmith.infer.drafters.controls import Empty, ScriptedDrafter, adversary, oracle
from draftsmith.infer.engine.chains import MOST_UNREAD
from draftsmith.infer.engine.engine import CHUNK, Engine
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.retrieval import PromptLookup

pytestmark = pytest.mark.filterwarnings("ignore")

# One of each kind of layer: gated delta rule, Mamba 2, short convolutions beside windows, Mamba 1 (which reads one
# token at a time behind a state), each between attention layers. The other families are slow; Zaya, whose tiny model
# repeats itself at temperature 0, is left to the sweep of all families.
QUICK = ["qwen3_next", "granitemoehybrid", "lfm3", "jamba"]
SLOW = [
    "bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "kimi_linear", "lfm2", "lfm2_moe", "mamba", "mamba2",
    "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "zamba",
]  # fmt: skip
FAMILIES = [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)]
SAMPLED = Settings(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, seed=11)
NEW = (24, 15, 21, 18)


class PartlyRight(ScriptedDrafter):
    """Trees: the plain answer for five tokens, wrong at one depth or at none, and unlikely wrong siblings first."""

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget], policy: Any = None) -> list[Draft]:
        drafts = []
        for row, budget in zip(rows, budgets):
            done, draft, at = len(row.new_ids), Draft(), ROOT
            ahead = self._answers[row.key][done : done + min(self.num_draft_tokens, budget.depth)]
            for depth, token in enumerate(ahead if budget.nodes else ()):
                draft.outright(at, (token + 1) % 80, self.name, 0.2)
                at = draft.outright(at, (token + 2) % 80 if done % 7 == depth else token, self.name, 0.7)
            drafts.append(draft)
        return drafts


@functools.cache
def target_of(kind: str) -> HFTarget:
    from transformers import GenerationConfig

    model = tiny_family(kind)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return HFTarget(model)


def make_rows(settings: Settings, count: int = len(NEW)) -> list[Row]:
    """Prompts of uneven length, half of each repeated."""
    rows = []
    for i in range(count):
        ids = [8 + (7 * at + 11 * i + at * at) % 72 for at in range(9 + 6 * i)]
        rows.append(Row(str(i), ids + ids[: len(ids) // 2], settings, Stops(NEW[i])))
    return rows


@functools.cache
def plain(kind: str, settings: Settings) -> list[list[int]]:
    return tokens(decode(target_of(kind), Empty(), make_rows(settings)))


def assert_tried_all_ways(generations: Sequence[Generation], deep: int = 3) -> None:
    assert_tried_hard(generations, deep)
    traces = [trace for generation in generations for trace in generation.traces]
    assert any(0 < trace.accepted < trace.nodes for trace in traces), "no draft was accepted in part"
    assert any(0 < trace.accepted == trace.nodes for trace in traces), "no draft was accepted as a whole"


@pytest.mark.parametrize("kind", FAMILIES)
def test_plain_decoding_equals_transformers_generate(kind: str) -> None:
    target = target_of(kind)
    assert target.draft_shape == "chain"
    assert plain(kind, Settings()) == [plain_answer(target.model, row.ids, row.left) for row in make_rows(Settings())]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("settings", [Settings(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_trees_right_in_parts_give_plain_s_tokens(kind: str, settings: Settings, batch_size: int) -> None:
    wanted = plain(kind, settings)
    drafter = PartlyRight("partly right", 0, 5)
    drafter.learn({str(i): answer for i, answer in enumerate(wanted)})
    generations = decode(target_of(kind), drafter, make_rows(settings), batch_size)
    assert tokens(generations) == wanted
    assert_tried_all_ways(generations)


@pytest.mark.parametrize("settings", [Settings(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_recycling_gives_plain_s_tokens_and_the_second_answer_is_drafted(kind: str, settings: Settings) -> None:
    drafter = Recycling(nodes=12)
    drafter.bind(target_of(kind))
    for _ in range(2):
        generations = generate(target_of(kind), drafter, make_rows(settings), batch_size=3)
        assert tokens(generations) == plain(kind, settings)
    traces = [trace for generation in generations for trace in generation.traces]
    assert max(trace.accepted for trace in traces) >= (2 if settings.greedy else 1)
    assert any(not tried.accepted for trace in traces for tried in trace.tried)
    assert any(0 < trace.accepted < trace.nodes for trace in traces)


def test_lookahead_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="verifies chains"):
        Lookahead().bind(target_of("qwen3_next"))


@pytest.mark.parametrize("settings", [Settings(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_prompt_lookup_gives_plain_s_tokens(kind: str, settings: Settings) -> None:
    generations = decode(target_of(kind), PromptLookup(), make_rows(settings), 3)
    assert tokens(generations) == plain(kind, settings)
    assert any(not tried.accepted for generation in generations for trace in generation.traces for tried in trace.tried)


@pytest.mark.parametrize("kind", ["qwen3_next", "jamba"])
def test_a_draft_model_s_trees_give_plain_s_tokens(kind: str, make_model: Any) -> None:
    draft = make_model("llama", torch.float64, vocab_size=96)
    drafter = SmallLM(draft, num_draft_tokens=4, top_k=3, nodes=12, width=3, min_confidence=0.0)
    generations = decode(target_of(kind), drafter, make_rows(Settings()), 3)
    assert tokens(generations) == plain(kind, Settings())
    assert any(trace.nodes for generation in generations for trace in generation.traces)


def drawn(kind: str, rule: str, make_model: Any, batch_size: int = 3, chunk: int = CHUNK) -> list[Generation]:
    draft = make_model("llama", torch.float64, vocab_size=96)
    drafter = SmallLM(draft, num_draft_tokens=3, top_k=2, nodes=9, sample=True)
    drafter.bind(target_of(kind))
    with Engine(target_of(kind), drafter, batch_size=batch_size, rule=rule, chunk=chunk) as engine:
        return engine.run(make_rows(SAMPLED), strict=True)


def check_batches(kind: str, rule: str, make_model: Any, chunk: int = CHUNK) -> None:
    """Rows beside a row may leave it less to read again: that must not decide when it is drafted."""
    alone, beside = (drawn(kind, rule, make_model, batch_size, chunk) for batch_size in (1, 3))
    assert tokens(beside) == tokens(alone)
    # Only what is read again may differ.
    assert [[(trace.context, trace.nodes, trace.accepted) for trace in one.traces] for one in beside] == [
        [(trace.context, trace.nodes, trace.accepted) for trace in one.traces] for one in alone
    ]
    traces = [trace for one in alone for trace in one.traces[1:-1]]
    assert any(trace.accepted for trace in traces)
    assert any(not tried.accepted for trace in traces for tried in trace.tried)
    # A target that reads token by token has nothing to read again.
    assert any(not trace.nodes for trace in traces) == (kind == "qwen3_next"), "no row had too much to read again"


@pytest.mark.parametrize(("rule", "chunk"), [("token", CHUNK), ("block", CHUNK), ("token", 45)])
@pytest.mark.parametrize("kind", ["qwen3_next", "jamba"])
def test_the_text_of_drawn_drafts_does_not_depend_on_the_batch(
    kind: str, rule: str, chunk: int, make_model: Any
) -> None:
    """In the smaller chunk the rows' prompts do not fit beside one another: jamba reads them whole, before a step."""
    check_batches(kind, rule, make_model, chunk)


def test_judging_a_row_by_what_its_batch_left_it_to_read_is_caught(
    monkeypatch: pytest.MonkeyPatch, make_model: Any
) -> None:
    monkeypatch.setattr(HFTarget, "unread_alone", HFTarget.unread)
    with pytest.raises(AssertionError):
        check_batches("qwen3_next", "token", make_model)


def test_drafting_at_once_for_a_prompt_that_was_read_whole_is_caught(
    monkeypatch: pytest.MonkeyPatch, make_model: Any
) -> None:
    plant(monkeypatch, Engine, "_read", "0 if self.target.unread(row) else len(row.ids)", "0")
    with pytest.raises(AssertionError):
        check_batches("jamba", "token", make_model, 45)


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("kind", ["qwen3_next", "jamba"])
def test_drawn_drafts_are_verified_as_chains(kind: str, rule: str, make_model: Any) -> None:
    """Trees are cut to the chains of their first trials, so `block` verifies them jointly."""
    generations = drawn(kind, rule, make_model)
    traces = [trace for generation in generations for trace in generation.traces]
    assert {trace.jointly for trace in traces if trace.nodes} == {rule == "block"}
    assert any(trace.accepted for trace in traces)
    assert any(not tried.accepted for trace in traces for tried in trace.tried)
    assert all(trace.nodes <= 3 for trace in traces)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kind", QUICK)
def test_the_controls_are_lossless_and_bound_the_rest(kind: str, batch_size: int) -> None:
    wanted = plain(kind, Settings())
    steps = {}
    for drafter in (oracle(4), adversary(4)):
        drafter.learn({str(i): answer for i, answer in enumerate(wanted)})
        generations = decode(target_of(kind), drafter, make_rows(Settings()), batch_size)
        assert tokens(generations) == wanted
        steps[drafter.name] = sum(len(generation.traces) for generation in generations)
        read_first = [generation.traces[0].read > MOST_UNREAD for generation in generations]
    assert steps["adversary"] == sum(map(len, wanted))
    # Behind a prompt that is read in the same pass nothing is drafted: it would be read again after a rejection.
    assert steps["oracle"] == sum(first + -(-(len(answer) - first) // 5) for answer, first in zip(wanted, read_first))
    assert any(read_first)


def test_a_row_whose_drafts_are_never_accepted_to_their_end_is_read_up_now_and_then() -> None:
    target, wanted = target_of("qwen3_next"), plain("qwen3_next", Settings())
    drafter = adversary(4)
    drafter.learn({str(i): answer for i, answer in enumerate(wanted)})
    drafter.bind(target)
    unread: list[int] = []
    rows = make_rows(Settings(), 1)
    (generation,) = generate(
        target, drafter, rows, on_tokens=lambda row, ids: unread.append(target.unread(row) if not row.stop else 0)
    )
    assert generation.token_ids == wanted[0]
    assert max(unread) == MOST_UNREAD + 1
    assert min(trace.nodes for trace in generation.traces[:-1]) == 0
    assert sum(trace.nodes > 0 for trace in generation.traces) > len(generation.traces) // 2


class Listening(PartlyRight):
    """Keeps the states that it is given."""

    features = ("last", "layer:1")

    def __init__(self, drafts_unread: bool) -> None:
        super().__init__("listening", 0, 5)
        self.drafts_unread = drafts_unread
        self.given: dict[str, list[Any]] = {}

    def read(self, rows: Sequence[Row], feedback: Sequence[Any]) -> None:
        super().read(rows, feedback)
        for row, one in zip(rows, feedback):
            self.given.setdefault(row.key, []).append(one)

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Any], feedback: Sequence[Any]) -> None:
        for row, one in zip(rows, feedback):
            self.given.setdefault(row.key, []).append(one)


@pytest.mark.parametrize("drafts_unread", [True, False])
@pytest.mark.parametrize("kind", ["qwen3_next", "jamba"])
def test_states_are_handed_out_once_per_token_and_are_those_of_a_plain_pass(kind: str, drafts_unread: bool) -> None:
    """Those of a prompt that the first step reads come with that step, or with the next round's `read`."""
    target, drafter = target_of(kind), Listening(drafts_unread)
    drafter.learn({str(i): answer for i, answer in enumerate(plain(kind, Settings()))})
    rows = make_rows(Settings(), 3)
    generations = decode(target, drafter, rows, 3)
    assert_tried_all_ways(generations)
    for row in rows:
        upto = 0
        for one in drafter.given[row.key]:
            assert one.start == upto
            upto += len(one.features["last"])
        assert upto == len(row.ids) - 1
        plain_states = target.model(torch.tensor([row.ids[:-1]]), use_cache=False, output_hidden_states=True)
        for name, layer in (("last", -1), ("layer:1", 1)):
            states_TD = torch.cat([one.features[name] for one in drafter.given[row.key]])
            torch.testing.assert_close(states_TD, plain_states.hidden_states[layer][0], atol=1e-4, rtol=1e-4)
