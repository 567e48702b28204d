"""What `top:K` gives is what a fresh pass gives, at every node and every prompt token, and the text stays plain's."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from decoded import assert_tried_hard
from planted import plant
from tiny_families import tiny_family

from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.protocols import Budget, Feedback, Verdict
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.contract.top_tokens import TopTokens, states_asked, top_asked
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.drafters.controls import Empty, ScriptedDrafter
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.models import top_reader
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.recorded_target import RecordedTarget
from draftsmith.infer.models.runner import model_runner
from draftsmith.infer.models.runner.model_runner import ModelRunner

pytestmark = pytest.mark.filterwarnings("ignore")

K = 5
GREEDY, SAMPLED = Settings(), Settings(temperature=0.9, top_k=40, seed=11)


class Reading(ScriptedDrafter):
    """Trees that are right in part, with wrong siblings and probes; keeps what it is given."""

    features = (f"top:{K}", "last")

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        super().__init__("reading", 0, 4)
        self.learn({str(i): answer for i, answer in enumerate(answers)})
        self.given: dict[str, list[Feedback]] = {}
        self.observed: dict[str, list[Feedback]] = {}
        self.proposed = 0

    def read(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        for row, one in zip(rows, feedback):
            self.given.setdefault(row.key, []).append(one)

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        self.read(rows, feedback)
        for row, one in zip(rows, feedback):
            self.observed.setdefault(row.key, []).append(one)

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget], policy: Any = None) -> list[Draft]:
        drafts = []
        for row, budget in zip(rows, budgets):
            done, draft, at = len(row.new_ids), Draft(), ROOT
            for depth, token in enumerate(self._answers[row.key][done : done + min(4, budget.depth)]):
                other = draft.outright(at, (token + 1) % self._vocab_size, self.name, 0.3)
                if depth + 1 < budget.depth:
                    draft.probe(other, (token + 5) % self._vocab_size)
                at = draft.outright(at, (token + 2) % self._vocab_size if done % 5 == depth else token, self.name, 0.8)
            drafts.append(draft)
            self.proposed += len(draft)
        return drafts


def make_rows(settings: Settings = GREEDY) -> list[Row]:
    return [
        Row(str(i), [8 + (7 * at + 11 * i + at * at) % 50 for at in range(6 + 9 * i)], settings, Stops(14 + 3 * i))
        for i in range(3)
    ]


def ids_of(done: Sequence[Generation]) -> list[list[int]]:
    return [one.token_ids for one in done]


def fresh_logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits_V: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits_V


def check_top(model: Any, row: Row, top: TopTokens) -> None:
    """Every entry equals the top-k of a fresh pass over its own context."""
    assert len(top) == len(top.parents) == len(top.ids_NK) == len(top.logits_NK)
    for index, parent in enumerate(top.parents):
        assert ROOT <= parent < index
        wanted_V = fresh_logits(model, row.ids[: top.start] + top.path(index))
        best_K, ids_K = wanted_V.topk(K)
        assert top.ids_NK[index, :K].tolist() == ids_K.tolist()
        torch.testing.assert_close(torch.tensor(top.logits_NK[index, :K]), best_K.double(), rtol=0, atol=1e-4)


def check_run(target: HFTarget, settings: Settings, policy: Policy | None = None) -> Reading:
    wanted = ids_of(generate(target, Empty(), make_rows(settings)))
    drafter, rows = Reading(wanted), make_rows(settings)
    drafter.bind(target)
    with Engine(target, drafter, batch_size=3, policy=policy, chunk=20) as engine:
        done = engine.run(rows, strict=True)
    assert ids_of(done) == wanted
    assert_tried_hard(done)
    for row in rows:
        tops = [one.top for one in drafter.given[row.key] if one.top is not None]
        for top in tops:
            check_top(target.model, row, top)
        # Every token but the newest, and refused nodes beside.
        known = {top.start + len(top.path(i)) - 1 for top in tops for i in range(len(top))}
        assert known >= set(range(len(row.ids) - 1))
        read = [(tuple(row.ids[: top.start] + top.path(i)), top) for top in tops for i in range(len(top))]
        assert any(tuple(row.ids[: len(path)]) != path for path, _ in read)
    return drafter


@functools.cache
def target_of(kind: str, static: bool = False) -> HFTarget:
    from tiny_models import tiny_model

    target = HFTarget(tiny_model(kind))
    assert not static or (isinstance(target.lm, ModelRunner) and target.lm.capture())
    return target


@pytest.mark.parametrize("settings", [Settings(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("kind", "static"), [("llama", False), ("llama", True), ("gemma2", False)])
def test_top_tokens_are_those_of_a_fresh_pass_at_every_node(
    monkeypatch: pytest.MonkeyPatch, kind: str, static: bool, settings: Settings
) -> None:
    monkeypatch.setattr(model_runner, "LOGITS_CHUNK", 7)
    drafter = check_run(target_of(kind, static), settings)
    assert all(one.features["last"].shape[0] == one.count for some in drafter.given.values() for one in some)


@pytest.mark.parametrize("kind", ["qwen3_next", "jamba"])
def test_a_target_that_verifies_chains_gives_them_at_every_node_of_the_chain(kind: str) -> None:
    check_run(HFTarget(tiny_family(kind)), Settings())


def test_nodes_are_named_as_they_were_scored_after_the_policy_cut_the_draft() -> None:
    dear = Policy(Costs({"target": PassCost((1, 18, 40), (1.0, 1.3, 9.0))}))
    drafter = check_run(target_of("llama"), Settings(), dear)
    scored = sum(len(one.top) - 1 for some in drafter.observed.values() for one in some if one.top is not None)
    assert 30 < scored < drafter.proposed


@pytest.mark.parametrize(
    ("owner", "name", "sound", "fault"),
    [
        (HFTarget, "_note_top", "new + parent for", "new - 1 + parent for"),
        (HFTarget, "_note_top", "new + parent for", "1 + parent for"),
        (HFTarget, "_new", "- max(self._given[row], self.lm.length(row)) if", "- (len(row.ids) - 1) if"),
        (HFTarget, "_note_top", "at = end", "at = end - 1"),
        (top_reader, "packed_top", ".topk(min(k", ".abs().topk(min(k"),
        (top_reader.PromptTop, "taken", "starts[row], parts", "0 * starts[row], parts"),
    ],
)
def test_planted_faults_are_caught(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, sound: str, fault: str
) -> None:
    plant(monkeypatch, owner, name, sound, fault)
    with pytest.raises((AssertionError, IndexError)):
        check_run(target_of("llama"), Settings())


def check_only_rows_that_asked() -> None:
    target, rows = HFTarget(target_of("llama").model), make_rows()
    for row, features in zip(rows, [(), (f"top:{K}",), ()]):
        target.admit([row], features)
    prefilled = target.prefill(rows, 64)
    assert [one.top is not None for one in prefilled] == [False, True, False]
    before = target.lm.transfers.downloads
    drafts = [Draft().chain([9, 10], "any") for _ in rows]
    scores = target.score(rows, drafts)
    assert target.lm.transfers.downloads == before + 1
    choice = scores.distribution(1).choice(ROOT)
    feedback = target.commit(rows, [Verdict([], [], 9, committed=[9]) for _ in rows])
    assert [one.top is not None for one in feedback] == [False, True, False]
    top = feedback[1].top
    assert top is not None
    assert top.ids_NK[0, 0] == choice
    check_top(target.model, rows[1], top)


def test_only_rows_that_asked_get_any_and_a_step_stays_one_download(monkeypatch: pytest.MonkeyPatch) -> None:
    check_only_rows_that_asked()
    plant(monkeypatch, HFTarget, "_read", "range(at, at + count) if", "range(count) if")
    with pytest.raises(AssertionError):
        check_only_rows_that_asked()


def test_logits_that_are_not_finite_give_no_ids() -> None:
    logits_NV = torch.zeros(3, 9)
    logits_NV[1, 4] = float("nan")
    ids_NK, _ = top_reader.unpacked(top_reader.packed_top(logits_NV, 2).numpy())
    assert (ids_NK[1] == -1).all()
    assert (ids_NK[[0, 2]] >= 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_choices_are_torchs_own_argmax_with_ties_and_values_that_are_not_finite(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits_NV = (torch.randn(40, 700) * 3).to(dtype)  # a dozen ties for the largest in 16 bits
    logits_NV[1, 4] = float("nan")
    logits_NV[2, 600] = float("inf")
    logits_NV[3] = -float("inf")
    logits_NV[4, 9:] = -float("inf")
    logits_NV[5] = 0
    logits_NV[6, [77, 300, 699]] = 50
    wanted = logits_NV.argmax(-1)
    wanted[1:4] = -1
    assert wanted[6] == 77
    assert torch.equal(top_reader.chosen(logits_NV), wanted)


def test_recorded_answers_and_wrong_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no likeliest tokens"):
        RecordedTarget({"0": [3]}, 61).admit([Row("0", [3])], ("top:8",))
    for wrong in ("top:", "top:0", "top:many"):
        with pytest.raises(ValueError, match="top:8"):
            target_of("llama").admit([Row("0", [3])], (wrong,))
    assert top_asked(("last", "top:3", "top:8")) == 8
    assert states_asked(("last", "top:3")) == ("last",)
