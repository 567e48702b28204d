"""Lookahead's pool is that of a Jacobi run by brute force, probes are never accepted, and a cut is all or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from planted import plant

from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.protocols import Budget, Feedback, Verdict
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.drafters import Lookahead
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.drafters.lookahead import NgramPool
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.models.hf_target import HFTarget

W, N, G = 4, 3, 3


def argmax(model: Any, ids: Sequence[int]) -> int:
    with torch.inference_mode():
        return int(model(torch.tensor([list(ids)]), use_cache=False).logits[0, -1].argmax())


class BruteForce(Lookahead):
    """Keeps a second pool: columns by the position of their first guess, every argmax by a fresh pass."""

    def __init__(self, model: Any) -> None:
        super().__init__(window=W, ngram=N, guesses=G, own_text=False)
        self.model = model
        self.wanted = NgramPool(G)
        self.at: dict[int, list[int]] = {}
        self.steps = 0
        self.drafts: list[Draft] = []

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget], policy: Any = None) -> list[Draft]:
        drafts = super().propose(rows, budgets, policy)
        self.drafts += drafts
        if not self.at and len(drafts[0]):
            newest = len(rows[0].ids) - 1
            self.at = {newest + j: [self._any_token(rows[0], j)] for j in range(W)}
        return drafts

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        (row,), (verdict,), deep = rows, verdicts, self.drafts[-1].depth
        newest = len(row.ids) - len(verdict.committed) - 1
        longer: dict[int, list[int]] = {}
        complete: dict[int, list[int]] = {}
        for j in range(W if self.at else 0):
            first = [self.at[newest + i][0] for i in range(1, j + 1)]
            column = self.at[newest + j]
            if j + len(column) - 1 > deep:
                longer |= {newest + i: self.at[newest + i] for i in range(j, W)}
                break
            column = [*column, argmax(self.model, [*row.ids[: newest + 1], *first, *column[1:]])]
            if len(column) == N:
                self.wanted.add(row.ids[newest] if j == 0 else column[0], tuple(column[1:]))
                complete[newest + j + 1] = column[1:]
            else:
                longer[newest + j] = column
        super().observe(rows, verdicts, feedback)
        now = len(row.ids) - 1
        if self.at:
            shifted = {at: column[1:] for at, column in longer.items() if len(column) > 1}
            later = {at + 1: column for at, column in shifted.items()}
            known = later | complete | longer
            self.at = {now + j: list(known.get(now + j) or [self._any_token(row, j)]) for j in range(W)}
            self.at[now][0] = row.ids[-1]
            self.steps += 1
            (window,) = self._windows.values()
            assert window.columns == [self.at[now + j] for j in range(W)]
            assert window.pool.known == self.wanted.known
            assert [list(some) for some in window.pool.known.values()] == [
                list(some) for some in self.wanted.known.values()
            ]


def check_pool(model: Any, settings: Settings) -> None:
    target, drafter = HFTarget(model), BruteForce(model)
    drafter.bind(target)
    row = Row("0", [3, 9, 4, 17, 9, 4, 30], settings, Stops(36))
    (done,) = Engine(target, drafter).run([row], strict=True)
    plain = Row("0", [3, 9, 4, 17, 9, 4, 30], settings, Stops(36))
    assert done.token_ids == Engine(target).run([plain], strict=True)[0].token_ids
    assert drafter.steps > 8
    assert sum(map(len, drafter.wanted.known.values())) > 8
    assert max(trace.accepted for trace in done.traces) >= 1
    assert any(draft.probes for draft in drafter.drafts)


@pytest.mark.parametrize("settings", [Settings(), Settings(temperature=0.9, seed=3)], ids=["greedy", "sampled"])
def test_the_pool_is_that_of_a_jacobi_run_by_brute_force(make_model: Any, settings: Settings) -> None:
    check_pool(make_model("llama"), settings)


@pytest.mark.parametrize(
    ("name", "sound", "fault"),
    [
        ("_iterate", "places.get((row_0, column[0]))", "places.get((0, column[0]))"),
        ("_iterate", "window.pool.add(top.tokens[0] if j == 0 else column[0],", "window.pool.add(column[-2],"),
        ("_move", "j + committed - 1", "j"),
        ("_move", "new[0][0] = row.ids[-1]", "pass"),
        ("_draft", "draft.probe(below, token) if j", "draft.outright(below, token, source, 0.1) if j"),
    ],
)
def test_planted_faults_are_caught(
    make_model: Any, monkeypatch: pytest.MonkeyPatch, name: str, sound: str, fault: str
) -> None:
    plant(monkeypatch, Lookahead, name, sound, fault)
    with pytest.raises((AssertionError, KeyError, IndexError)):
        check_pool(make_model("llama"), Settings())


def test_probes_are_never_accepted_even_where_they_are_right(make_model: Any) -> None:
    """A window that holds the plain text everywhere: row 0 and column 0 are accepted, what hangs below row 0 is not."""
    model = make_model("llama")
    target = HFTarget(model)
    ids = [3, 9, 4, 17]
    answer = Engine(target).run([Row("0", ids, stops=Stops(30))])[0].token_ids
    drafter = Lookahead(window=W, ngram=N, guesses=G, own_text=False)
    drafter.bind(target)
    row = Row("0", ids, stops=Stops(30))
    with Engine(target, drafter) as engine:
        engine.add(row)
        for _ in range(2):  # the prompt is handed on after the first token
            engine.step()
        window, text = drafter._windows[row], [*ids, *answer]
        at = len(row.ids) - 1
        window.pool.known.clear()
        window.columns = [text[at + j : at + j + N - 1] for j in range(W)]
        before = len(row.ids)
        (draft,) = drafter.propose([row], [Budget(64, 64)])
        tried = {trial.node for trials in draft.trials.values() for trial in trials}
        assert draft.probes
        assert not draft.probes & tried
        engine.step()
        # Row 0 is W - 1 long, and the target's own token follows; the last column's probe was right too.
        assert len(row.ids) - before == W
    assert row.ids == text[: len(row.ids)]


@pytest.mark.parametrize(("per_node", "kept"), [(0.001, True), (0.5, False)])
def test_the_policy_keeps_a_window_as_a_whole_or_not_at_all(make_model: Any, per_node: float, kept: bool) -> None:
    target = HFTarget(make_model("llama"))
    drafter = Lookahead(window=W, ngram=N, guesses=G)
    drafter.bind(target)
    sizes: list[tuple[int, int]] = []
    policy = Policy(Costs({"target": PassCost((1, 101), (1.0, 1.0 + 100 * per_node))}))
    cut = policy.cut

    def noted(rows: Sequence[Row], drafts: Sequence[Draft]) -> list[Draft]:
        left = cut(rows, drafts)
        sizes.extend((len(draft), len(after)) for draft, after in zip(drafts, left))
        return left

    policy.cut = noted  # type: ignore[method-assign]
    rows = [Row(str(i), [3 + i, 9, 4, 17, 9, 4], stops=Stops(50)) for i in range(2)]
    done = Engine(target, drafter, batch_size=2, policy=policy).run(rows, strict=True)
    plain = Engine(target).run([Row(row.key, [3 + i, 9, 4, 17, 9, 4], stops=Stops(50)) for i, row in enumerate(rows)])
    assert [one.token_ids for one in done] == [one.token_ids for one in plain]
    assert all(after in (0, before) for before, after in sizes)
    assert any(after > W for _, after in sizes) is kept


def test_wrong_arguments_and_targets_are_refused_in_one_line() -> None:
    for wrong in ({"window": 0}, {"ngram": 1}, {"guesses": 0}):
        with pytest.raises(ValueError, match="must be at least"):
            Lookahead(**wrong)
    drafter = Lookahead()
    row = Row("0", [3, 4])
    drafter.open([row])
    with pytest.raises(ValueError, match="does not give them"):
        drafter.observe([row], [Verdict([], [], 4, committed=[4])], [Feedback(0, 1)])
    assert drafter.propose([row], [Budget(0, 0)])[0].parents == []
    assert all(parent >= ROOT for parent in drafter.propose([row], [Budget(9, 9)])[0].parents)
    assert not Empty.features
