"""Rows that begin with the same tokens hold and read them once, and say what they say alone."""

from __future__ import annotations

from typing import Any

import pytest
from planted import plant

from draftsmith.infer.contract.row import SHARED_BY, Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.drafters import SmallLM
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.retrieval import PromptLookup

PROMPT = [3 + (7 * i) % 50 for i in range(300)]
DRAFTERS = {
    "plain": lambda model: Empty(),
    "pld": lambda model: PromptLookup(),
    "small": lambda model: SmallLM(model, min_confidence=0.0),
}


@pytest.fixture(scope="module")
def pair(make_model: Any, shake: Any) -> tuple[Any, Any]:
    model = make_model("llama")
    return model, shake(model, 0.06)


def make_rows() -> list[Row]:
    """One prompt sampled five times, two questions behind the same beginning, one row that parts early, and one that
    shares too little."""
    settings = Settings(temperature=0.9, top_k=40, seed=3)
    rows = [Row(f"sample {i}", PROMPT, settings, Stops(20 + i)) for i in range(5)]
    rows += [Row(f"question {i}", [*PROMPT[:200], 5 + i, 9, 4], stops=Stops(24)) for i in range(2)]
    rows.append(Row("early", [*PROMPT[:70], *PROMPT[219:69:-1]], stops=Stops(12)))
    return [*rows, Row("other", [*PROMPT[: SHARED_BY - 1], 2], stops=Stops(9))]


def check_shared(pair: tuple[Any, Any], name: str) -> None:
    alone = []
    for row in make_rows():
        drafter = DRAFTERS[name](pair[1])
        target = HFTarget(pair[0])
        drafter.bind(target)
        alone.append(Engine(target, drafter).run([row])[0].token_ids)
    target, drafter = HFTarget(pair[0]), DRAFTERS[name](pair[1])
    drafter.bind(target)
    read: list[int] = []
    inner = target.lm.prefill
    target.lm.prefill = lambda rows, tokens, *args, **more: (
        read.extend(map(len, tokens)), inner(rows, tokens, *args, **more)
    )[1]  # fmt: skip
    engine = Engine(target, drafter, batch_size=9, chunk=100)
    largest = 0
    rows = make_rows()
    for row in rows:
        engine.add(row)
    done = {}
    while engine.busy:
        for event in engine.step():
            if event.done:
                done[event.row] = event.done
        largest = max(largest, target.lm.cache.size)
    assert [done[row].token_ids for row in rows] == alone
    assert len({tuple(tokens) for tokens in alone[:5]}) == 5, "the samples differ"
    read += [trace.read for one in done.values() for trace in one.traces]
    assert sum(read) < 299 + 4 * (299 % SHARED_BY + 1) + 2 * (202 % SHARED_BY + SHARED_BY) + 64 + 156
    assert largest < 1.25 * (300 + 5 * 43 + 2 * 75 + 156 + 64 + 9 * 60)
    if name != "plain":
        traces = [trace for one in done.values() for trace in one.traces]
        assert max(trace.accepted for trace in traces) >= 2
        assert any(not tried.accepted for trace in traces for tried in trace.tried)
    assert not target.lm._rows
    assert not target.lm.cache._regions


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_shared_beginning_is_read_and_held_once(pair: tuple[Any, Any], name: str) -> None:
    check_shared(pair, name)


@pytest.mark.parametrize(
    ("owner", "method", "sound", "fault"),
    [
        (Engine, "_can_share", "return any(", "return False and any("),
        (HFTarget, "_open", "if source is not None and shared[source]", "if False"),
        (Row, "begins_as", "self.ids[at] != other.ids[at]", "False"),
    ],
)
def test_planted_faults_of_sharing_are_caught(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, owner: Any, method: str, sound: str, fault: str
) -> None:
    plant(monkeypatch, owner, method, sound, fault)
    with pytest.raises(AssertionError):
        check_shared(pair, "plain")
