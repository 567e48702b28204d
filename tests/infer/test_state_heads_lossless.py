"""Medusa and Hydra heads in every family: token-identical to plain decoding in float64, greedy and sampled.

Every test asserts that its own run accepted deep, rejected, and varied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoded import assert_tried_hard, decode, tokens
from test_lossless import ARCHITECTURES, ROWS, SAMPLED, make_rows
from tiny_heads import fitted

from draftsmith.infer.contract.protocols import Drafter
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.drafters import Hydra, Medusa, Mixed
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.retrieval import PromptLookup

SHAPE: dict[str, Any] = {"top_k": 3, "nodes": 12, "min_confidence": 0.0}
COSTS = Costs({"target": PassCost((1, 16), (1.0, 1.1)), "medusa": PassCost((1, 16), (0.02, 0.03)),
               "hydra": PassCost((1, 16), (0.005, 0.008))})  # fmt: skip
MAKE: dict[str, Callable[[Any, Any], Drafter]] = {
    "medusa": lambda medusa, hydra: Medusa(medusa, **SHAPE, sample="coupled"),
    "medusa by cost": lambda medusa, hydra: Medusa(medusa, costs=COSTS, sample="likeliest"),
    "medusa in a mix": lambda medusa, hydra: Mixed([PromptLookup(), Medusa(medusa, top_k=3)], nodes=16),
    "hydra": lambda medusa, hydra: Hydra(hydra, **SHAPE, sample="coupled"),
    "hydra by cost": lambda medusa, hydra: Hydra(hydra, costs=COSTS, sample="likeliest"),
    "hydra in a mix": lambda medusa, hydra: Mixed([PromptLookup(), Hydra(hydra, top_k=3)], nodes=16),
}


def slow(name: str, batch_size: int) -> Any:
    return pytest.param(name, batch_size, marks=pytest.mark.slow)


Decoded = tuple[Any, list[list[int]], list[list[int]], tuple[Any, Any]]


def decoded(model: Any) -> Decoded:
    """A target, its answers to the rows, greedy and sampled, and heads that know them most of the time."""
    rows = [make_rows(Settings()), make_rows(SAMPLED)]
    plain, sampled = (tokens(decode(HFTarget(model), Empty(), some, ROWS)) for some in rows)
    texts = [row.ids for some in rows for row in some]
    medusa, hydra = (fitted(kind, model, texts) for kind in ("medusa", "hydra"))
    return model, plain, sampled, (medusa, hydra)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def target(request: pytest.FixtureRequest, make_model: Any) -> Decoded:
    return decoded(make_model(request.param))


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [
        ("medusa", 1), slow("medusa", 3), ("medusa", 8), ("hydra", 3), slow("hydra", 1), slow("hydra", 8),
        ("medusa in a mix", 3), slow("hydra in a mix", 8), slow("medusa by cost", 3), ("hydra by cost", 8),
    ],
)  # fmt: skip
def test_greedy_tokens_equal_plain_decoding(target: Decoded, name: str, batch_size: int) -> None:
    model, plain, _, heads = target
    generations = decode(HFTarget(model), MAKE[name](*heads), make_rows(Settings()), batch_size)
    assert tokens(generations) == plain
    assert_tried_hard(generations)


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [("medusa", 3), slow("medusa in a mix", 8), ("hydra", 8), slow("hydra in a mix", 3), slow("medusa by cost", 1)],
)
def test_outright_drafts_give_the_tokens_of_plain_sampling(target: Decoded, name: str, batch_size: int) -> None:
    model, _, sampled, heads = target
    generations = decode(HFTarget(model), MAKE[name](*heads), make_rows(SAMPLED), batch_size)
    assert tokens(generations) == sampled
    assert_tried_hard(generations, deep=1 if "cost" in name else 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_tokens_of_captured_passes_equal_plain_decoding_on_cuda(make_model: Any, kind: str, dtype: torch.dtype) -> None:
    model, plain, sampled, heads = decoded(make_model(kind, dtype).to("cuda"))
    for name in MAKE:
        for settings, wanted in ((Settings(), plain), (SAMPLED, sampled)):
            generations = decode(HFTarget(model), MAKE[name](*heads), make_rows(settings), 3)
            assert tokens(generations) == wanted
            assert_tried_hard(generations, deep=1)
