"""Simulated drafts: accepted as often as asked, every pass is run, no answer changes."""

from __future__ import annotations

import pytest

from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.drafters import SmallLM
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.drafters.simulated import SimulatedDrafter
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.models.hf_target import HFTarget


def rows(count=2, tokens=60):
    return [Row(str(i), [5 + i, 7, 11], stops=Stops(tokens)) for i in range(count)]


@pytest.fixture
def decoded(make_model):
    """Plain answers, and the same decoded with simulated drafts of an unrelated model."""
    target = HFTarget(make_model("llama"))

    def decode(acceptance, length=4, tokens=60, **shape):
        plain = generate(target, Empty(), rows(tokens=tokens), batch_size=2)
        inner = SmallLM(
            make_model("llama", seed=9), **({"num_draft_tokens": length, "top_k": 1, "min_confidence": 0.0} | shape)
        )
        drafter = SimulatedDrafter(inner, acceptance)
        drafter.learn({one.row: one.token_ids for one in plain})
        drafter.bind(target)
        return plain, generate(target, drafter, rows(tokens=tokens), batch_size=2), inner

    return decode


@pytest.mark.parametrize("acceptance", [0.0, 0.6, 1.0])
def test_acceptance_is_as_asked_and_the_answers_are_the_plain_ones(decoded, acceptance):
    plain, simulated, _ = decoded(acceptance, length=8, tokens=150)
    assert [one.token_ids for one in simulated] == [one.token_ids for one in plain]
    tried = [trial.accepted for one in simulated for trace in one.traces for trial in trace.tried]
    assert sum(tried) / len(tried) == pytest.approx(acceptance, abs=0.1)


def test_every_pass_of_the_inner_draft_is_run(decoded):
    seen = []
    _, simulated, inner = decoded(1.0)
    inner.reader.lm.model.register_forward_hook(lambda *_: seen.append(1))
    steps = len(simulated[0].traces)
    assert inner.bytes_moved == inner.reader.lm.weight_bytes * (sum(t.nodes for t in simulated[0].traces) + 1)
    assert steps < 60 / 4


def test_a_tree_is_refused(decoded):
    with pytest.raises(ValueError, match="top_k=1"):
        decoded(1.0, top_k=3)


def test_a_share_above_one_is_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        SimulatedDrafter(Empty(), 1.5)
