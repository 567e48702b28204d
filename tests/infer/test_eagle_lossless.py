"""EAGLE heads in every family: token-identical to plain decoding in float64, greedy and sampled.

Every test asserts that its own run accepted deep, rejected, and varied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_lossless import (
    ARCHITECTURES,
    EITHER,
    SAMPLED,
    assert_tried_hard,
    decode,
    make_rows,
    models,
    plain_tokens,
    spread,
    tokens,
)
from tiny_eagle import fitted_eagle, tiny_eagle

from draftsmith.infer.contract.protocols import Drafter
from draftsmith.infer.contract.row import Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.drafters import Eagle, Mixed
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.retrieval import PromptLookup

SHAPE: dict[str, Any] = {"num_draft_tokens": 4, "top_k": 3, "nodes": 12, "width": 3, "min_confidence": 0.0}
COSTS = Costs({"target": PassCost((1, 16), (1.0, 1.1)), "eagle": PassCost((1, 16), (0.002, 0.004))})
MAKE: dict[str, Callable[[Any], Drafter]] = {
    "eagle": lambda head: Eagle(head, **SHAPE, sample="coupled"),
    "eagle by cost": lambda head: Eagle(head, nodes=16, costs=COSTS, calibration="none", sample="coupled"),
    "eagle in a mix": lambda head: Mixed([PromptLookup(), Eagle(head, **SHAPE)], nodes=16),
}


def fitted_to(model: Any, *answers: list[list[int]]) -> Any:
    """A head that knows these answers to the rows, most of the time. It cannot draft one token in twelve."""
    texts = [row.ids + answer for some in answers for row, answer in zip(make_rows(Settings()), some)]
    ids = [token for token in range(61) if token % 12]
    return fitted_eagle(tiny_eagle(features=("layer:1", "layer:2", "last"), ids=ids), model, texts, 40)


@functools.cache
def head_of(kind: str) -> Any:
    return fitted_to(models(kind)[0], *(plain_tokens(kind, settings) for settings in EITHER.values()))


@pytest.mark.parametrize(("kind", "name", "batch_size"), spread(3, ARCHITECTURES, [*MAKE], [1, 3, 8]))
def test_greedy_tokens_equal_plain_decoding(kind: str, name: str, batch_size: int) -> None:
    generations = decode(HFTarget(models(kind)[0]), MAKE[name](head_of(kind)), make_rows(Settings()), batch_size)
    assert tokens(generations) == plain_tokens(kind, Settings())
    assert_tried_hard(generations)


@pytest.mark.parametrize(("kind", "name", "batch_size"), spread(3, ARCHITECTURES, [*MAKE], [1, 3, 8]))
def test_outright_drafts_give_the_tokens_of_plain_sampling(kind: str, name: str, batch_size: int) -> None:
    generations = decode(HFTarget(models(kind)[0]), MAKE[name](head_of(kind)), make_rows(SAMPLED), batch_size)
    assert tokens(generations) == plain_tokens(kind, SAMPLED)
    assert_tried_hard(generations)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_stop_token_within_the_path_of_a_head_ends_the_row_there(kind: str) -> None:
    rows, plain = make_rows(Settings()), plain_tokens(kind, Settings())
    for row, answer in zip(rows, plain):
        row.stops = Stops(row.stops.max_new_tokens, frozenset(answer[len(answer) // 2 :][:1]))
    wanted = [
        answer[: next(i for i, token in enumerate(answer) if token in row.stops.ids) + 1]
        for row, answer in zip(rows, plain)
    ]
    generations = decode(HFTarget(models(kind)[0]), MAKE["eagle"](head_of(kind)), rows, 3)
    assert tokens(generations) == wanted
    last = [one.traces[-1] for one in generations]
    assert any(trace.accepted == trace.committed for trace in last), "a drafted stop token was accepted"
    assert_tried_hard(generations)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_tokens_of_captured_passes_equal_plain_decoding_on_cuda(make_model: Any, kind: str, dtype: torch.dtype) -> None:
    model = make_model(kind, dtype).to("cuda")
    wanted = {
        settings: tokens(decode(HFTarget(model), Empty(), make_rows(settings), 8)) for settings in EITHER.values()
    }
    head = fitted_to(model, *wanted.values())
    for name in MAKE:
        for settings, answers in wanted.items():
            generations = decode(HFTarget(model), MAKE[name](head), make_rows(settings), 3)
            assert tokens(generations) == answers
            assert_tried_hard(generations, deep=1)
