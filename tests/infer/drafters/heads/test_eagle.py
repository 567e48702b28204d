"""Heads over pairs: the depth that one reaches that is always right, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_eagle import (
    CYCLE,
    cyclic,
    cyclic_target,
    planted,
    planted_eagle,
    tiny_eagle,
    tiny_mtp,
)
from tiny_models import tiny_model

from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.drafters import MTP, Eagle
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.heads.eagle import EagleHead
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.recorded_target import RecordedTarget

TREE = {"num_draft_tokens": 4, "top_k": 3, "nodes": 10, "width": 3, "min_confidence": 0.0, "sample": False}
DEEP = {"top_k": 1, "num_draft_tokens": 5, "min_confidence": 0.0}


@pytest.fixture(scope="module")
def target() -> HFTarget:
    return HFTarget(tiny_model("llama"))


@pytest.mark.parametrize("head", [planted_eagle, lambda: planted(tiny_mtp())], ids=["eagle", "mtp"])
@pytest.mark.parametrize("shape", [DEEP, {**TREE, "num_draft_tokens": 5}], ids=["chain", "tree"])
def test_a_head_that_is_always_right_reaches_its_full_depth(head: Any, shape: dict[str, Any]) -> None:
    target, made = HFTarget(cyclic_target()), head()
    rows = [Row(str(i), [(5 * i + j) % CYCLE for j in range(3 + i)], stops=Stops(30)) for i in range(3)]
    drafter = (Eagle if isinstance(made, EagleHead) else MTP)(made, **shape)
    drafter.bind(target)
    generations = generate(target, drafter, rows, batch_size=2)
    assert [one.token_ids for one in generations] == [cyclic(row.ids[row.prompt_tokens - 1], 30) for row in rows]
    for one in generations:  # the first step has no state to start from, and the last is cut
        assert [trace.accepted for trace in one.traces[1:-1]] == [5] * (len(one.traces) - 2)
        assert len(one.traces) == 6


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (lambda: tiny_eagle(48), "reads states of width 48, and the target's are 32 wide"),
        (lambda: tiny_eagle(features=("layer:0", "layer:3")), "reads layer:3, and the target has 2 layers"),
        (lambda: tiny_eagle(vocab=90, ids=[3, 80]), "drafts token 80, and the target has 61 tokens"),
        (lambda: tiny_eagle(layers=3, fc_norm=True), "as many norms of features as layers"),
    ],
)
def test_heads_of_other_targets_are_refused(target: HFTarget, head: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Eagle(head()).bind(target)


def test_recorded_answers_have_no_states() -> None:
    with pytest.raises(ValueError, match="it needs the target itself"):
        Eagle(tiny_eagle()).bind(RecordedTarget({}, 61, None))


def test_a_target_without_a_checkpoint_brings_no_head() -> None:
    with pytest.raises(ValueError, match="the head in the target's own checkpoint"):
        MTP().bind(HFTarget(tiny_model("llama")))
