"""Recycling keeps what the target last found likely, in bounded tables, and learns how often that comes true."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from planted import plant

from draftsmith.infer.contract.draft import ROOT
from draftsmith.infer.contract.protocols import Budget, Feedback, Verdict
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.contract.top_tokens import TopTokens
from draftsmith.infer.drafters import Recycling
from draftsmith.infer.drafters.recycling import SourceRates, TopTable
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.models.hf_target import HFTarget

K = 4


class Noting(Recycling):
    """Keeps all that it is given, in order, by full context."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(top_k=K, **arguments)
        self.given: list[tuple[list[int], list[int]]] = []

    def _note(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        for row, one in zip(rows, feedback):
            for i in range(len(one.top or ())):
                assert one.top is not None
                self.given.append((row.ids[: one.top.start] + one.top.path(i), one.top.ids_NK[i].tolist()))

    def read(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        super().read(rows, feedback)
        self._note(rows, feedback)

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        super().observe(rows, verdicts, feedback)
        self._note(rows, feedback)


def rows_of(count: int, settings: Settings, new: int = 20) -> list[Row]:
    return [
        Row(str(i), [3 + (7 * at + 5 * i) % 40 for at in range(4 + 5 * i)], settings, Stops(new)) for i in range(count)
    ]


def check_tables(model: Any, settings: Settings) -> None:
    drafter = Noting(max_key=3, nodes=10)
    target = HFTarget(model)
    drafter.bind(target)
    rows = rows_of(3, settings)
    Engine(target, drafter, batch_size=2, chunk=6).run(rows, strict=True)
    assert len(drafter.given) > 150
    # Every token that was read, those of prompts included, whichever pass read them.
    assert {tuple(row.ids[:end]) for row in rows for end in range(1, len(row.ids))} <= {
        tuple(c) for c, _ in drafter.given
    }
    for table in drafter._tables:
        wanted = {tuple(c[-table.length :]): ids for c, ids in drafter.given if len(c) >= table.length}
        assert len(table) == len(wanted)
        for key, ids in wanted.items():
            found = table.get(key)
            assert found is not None
            assert found[0] == ids


@pytest.mark.parametrize("settings", [Settings(), Settings(temperature=0.8, seed=2)], ids=["greedy", "sampled"])
def test_each_key_holds_what_was_likely_when_its_tokens_were_last_read(make_model: Any, settings: Settings) -> None:
    check_tables(make_model("llama"), settings)


@pytest.mark.parametrize(
    ("name", "sound", "fault"),
    [
        ("_write", "contexts[parent]", "contexts[-1]"),
        ("_write", ": top.start]", ": top.start + 1]"),
        ("_write", "table.length <= len(context)", "table.length < len(context)"),
    ],
)
def test_planted_faults_in_the_keys_are_caught(
    make_model: Any, monkeypatch: pytest.MonkeyPatch, name: str, sound: str, fault: str
) -> None:
    plant(monkeypatch, Recycling, name, sound, fault)
    with pytest.raises(AssertionError):
        check_tables(make_model("llama"), Settings())


def test_the_tables_outlive_rows_and_the_second_answer_is_drafted(make_model: Any) -> None:
    target, drafter = HFTarget(make_model("llama")), Recycling(nodes=12)
    drafter.bind(target)
    steps = []
    for _ in range(2):
        (done,) = Engine(target, drafter).run(rows_of(1, Settings(), 40), strict=True)
        assert done.token_ids == Engine(target).run(rows_of(1, Settings(), 40))[0].token_ids
        steps.append(len(done.traces))
    assert steps[1] < steps[0]
    drafter.bind(target)
    assert not any(len(table) for table in drafter._tables)


def test_a_full_table_gives_up_its_oldest_key() -> None:
    table = TopTable(1, 300, 2)
    rows = [np.array([i, i + 1]) for i in range(500)]
    for i, ids_K in enumerate(rows):
        table.put((i,), ids_K, np.array([9, 0]))
        table.put((0,), rows[7], np.array([5, 1]))  # written again and again, so it is never the oldest
        assert len(table) <= 300
    assert table.get((0,)) == ([7, 8], [5, 1])
    assert table.get((499,)) == ([499, 500], [9, 0])
    assert table.get((200,)) is None


def feedback_of(start: int, tokens: list[int], parents: list[int], ids: list[list[int]]) -> Feedback:
    logits_NK = np.tile(np.array([2.0, 1.0, 0.0, -1.0]), (len(tokens), 1))
    return Feedback(start, len(tokens), top=TopTokens(start, tokens, parents, np.array(ids), logits_NK))


def test_a_longer_key_goes_before_a_shorter_one_and_refused_nodes_count() -> None:
    drafter = Recycling(top_k=K, nodes=30, num_draft_tokens=2)
    row = Row("0", [1, 2])
    # Token 5 was refused below 2, and its own row is kept; what follows "9 2" is not what follows "1 2".
    drafter.read([Row("1", [9, 2, 5])], [feedback_of(0, [9, 2], [ROOT, 0], [[2, 3, 4, 5], [20, 21, 22, 23]])])
    drafter.read([row], [feedback_of(0, [1, 2, 5], [ROOT, 0, 1], [[2, 3, 4, 5], [5, 6, 7, 8], [30, 31, 32, 33]])])
    (draft,) = drafter.propose([row], [Budget(64, 64)])
    first = [draft.tokens[trial.node] for trial in draft.trials[ROOT]]
    assert first[:2] == [5, 6]
    below = draft.child(ROOT, 5)
    assert below is not None
    assert draft.tokens[draft.trials[below][0].node] == 30
    confidences = [trial.confidence for trial in draft.trials[ROOT]]
    assert confidences == sorted(confidences, reverse=True)
    drafter.read([Row("2", [8, 2])], [feedback_of(0, [8, 2], [ROOT, 0], [[2, 3, 4, 5], [40, 41, 42, 43]])])
    (draft,) = drafter.propose([row], [Budget(64, 1)])
    assert next(draft.tokens[trial.node] for trial in draft.trials[ROOT]) == 5
    assert {40, 41} <= set(draft.tokens)


def test_confidence_becomes_the_share_that_came_true_by_band() -> None:
    rates, other = SourceRates(2, K), SourceRates(2, K)
    known = [(10, 8, 0, 7), (11, 8, 1, 2)]
    for i in range(1500):
        rates.observe(known, 10 if i % 4 == 0 else 11 if i % 4 == 1 else 12)
    confidences = [one.confidence for one in rates.candidates(known, "recycle")]
    assert confidences == pytest.approx([0.25, 0.25], abs=0.02)
    assert other.candidates(known, "recycle")[0].confidence > 0.5
    drafter = Recycling()
    greedy, drawn = (drafter._rates_of(Row("0", [1], Settings(temperature=t))) for t in (0.0, 0.8))
    assert greedy is not drawn
    assert drawn is drafter._rates_of(Row("1", [1], Settings(temperature=0.7)))


def test_tokens_are_graded_by_what_was_known_before_their_step() -> None:
    """The step's own table entry names its token: grading after writing would find every draft right."""
    drafter = Recycling(top_k=K)
    row = Row("0", [1, 2])
    drafter.read([row], [feedback_of(0, [1, 2], [ROOT, 0], [[2, 3, 4, 5], [5, 6, 7, 8]])])
    before = drafter._rates_of(row).candidates(drafter._known([1, 2]), "recycle")
    row.ids.append(7)
    drafter.observe([row], [Verdict([], [], 7, committed=[7])], [feedback_of(1, [2], [ROOT], [[7, 6, 5, 4]])])
    drafter.read([row], [feedback_of(0, [1, 2], [ROOT, 0], [[2, 3, 4, 5], [5, 6, 7, 8]])])
    after = {one.token: one.confidence for one in drafter._rates_of(row).candidates(drafter._known([1, 2]), "recycle")}
    assert after[before[0].token] < before[0].confidence
    assert after[7] > {one.token: one.confidence for one in before}[7]


def test_wrong_arguments_and_targets_are_refused_in_one_line() -> None:
    for name in ("nodes", "num_draft_tokens", "top_k", "max_key", "entries"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            Recycling(**{name: 0})
    row = Row("0", [3, 4])
    with pytest.raises(ValueError, match="does not give them"):
        Recycling().read([row], [Feedback(0, 1)])
    with pytest.raises(ValueError, match="does not give them"):
        Recycling().observe([row], [Verdict([], [], 4, committed=[4])], [Feedback(0, 1)])
