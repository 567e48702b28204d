"""Drafts drawn from Medusa and Hydra heads: two steps of the engine's loop have the target's distribution exactly."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import tiny_heads as tiny
from decoded import assert_tried_hard
from planted import plant
from test_sampled_drafts import two_step_error

import draftsmith.infer.drafters.drawn as drawn_module
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.drafters import Hydra, Medusa
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.models.hf_target import HFTarget

PASSES = {"target": PassCost((1, 8), (1.0, 1.2)), "medusa": PassCost((1, 8), (0.3, 0.35)),
          "hydra": PassCost((1, 8), (0.1, 0.12))}  # fmt: skip
SHAPES = [
    ("block", {"top_k": 1}),
    ("token", {"top_k": 1, "costs": Costs(PASSES)}),
    ("traversal", {"top_k": 2, "nodes": 3, "replacement": True}),
]
MAKE = {"medusa": Medusa, "hydra": Hydra}


@pytest.fixture(scope="module")
def two_tokens(make_model: Any) -> Any:
    return make_model("llama", vocab_size=2, pad_token_id=None, bos_token_id=None, eos_token_id=None)


def enumerated(
    monkeypatch: pytest.MonkeyPatch, target: Any, kind: str, rule: str, shape: dict[str, Any]
) -> tuple[float, Counter[str]]:
    models = (target, tiny.random_heads(kind, 2))
    return two_step_error(monkeypatch, models, rule, {"num_draft_tokens": 2, **shape}, MAKE[kind])


@pytest.mark.parametrize(("rule", "shape"), SHAPES)
@pytest.mark.parametrize("kind", MAKE)
def test_two_steps_have_the_targets_distribution_exactly(
    monkeypatch: pytest.MonkeyPatch, two_tokens: Any, kind: str, rule: str, shape: dict[str, Any]
) -> None:
    error, seen = enumerated(monkeypatch, two_tokens, kind, rule, shape)
    assert error < 1e-9
    assert seen["deep in step 0"]
    assert seen["deep in step 1"]
    assert seen["refused in step 0"]
    assert seen["refused in step 1"]


PLANTED = {"medusa": lambda: tiny.planted_medusa(3), "hydra": lambda: tiny.planted_hydra(3)}


@pytest.mark.parametrize("costs", ["none", Costs(PASSES)], ids=["all", "by cost"])
@pytest.mark.parametrize("kind", MAKE)
def test_a_rows_tokens_do_not_depend_on_its_batch(kind: str, costs: Any) -> None:
    """Alone, each is decoded by an engine that expects as many rows."""
    target, batches, done = HFTarget(tiny.planted_target()), [[i] for i in range(6)], []
    for rows in (*batches, range(6)):
        drafter = MAKE[kind](PLANTED[kind](), sample="drawn", top_k=2, nodes=6, peaked=0.99, costs=costs)
        drafter.bind(target)
        done.append(generate(target, drafter, [drawn_row(i) for i in rows], batch_size=4))
    assert [one[0].token_ids for one in done[:-1]] == [one.token_ids for one in done[-1]]
    assert_tried_hard(done[-1])


def drawn_row(number: int) -> Row:
    settings = Settings(temperature=1.3, seed=4)
    return Row(str(number), [5 + number, 9, 12 + number], settings, Stops(24 + number))


@pytest.mark.parametrize("kind", MAKE)
def test_planted_numbers_that_come_back_in_the_next_step_are_caught(
    monkeypatch: pytest.MonkeyPatch, two_tokens: Any, kind: str
) -> None:
    plant(monkeypatch, drawn_module._Drawing, "_draw", "len(self.row.ids)", "0")
    error, _ = enumerated(monkeypatch, two_tokens, kind, "token", {"top_k": 1})
    assert error > 1e-3
