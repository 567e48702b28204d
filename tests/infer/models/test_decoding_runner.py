"""Captured passes are warmed up and checked at load, and left alone where they are wrong."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from planted import plant

from draftsmith.infer.models.architectures import prepare
from draftsmith.infer.models.decoding_runner import captured_error, decoding_runner, warm_up
from draftsmith.infer.models.runner.captured import CapturedPasses
from draftsmith.infer.models.runner.entries import Entries
from draftsmith.infer.models.runner.model_runner import ModelRunner
from draftsmith.infer.models.runner.static_reads import StaticReads

KINDS = ["llama", "gemma3", "gemma2", "gpt2"]


def static_runner(model: Any) -> ModelRunner:
    lm = ModelRunner(model, prepare(model))
    assert lm.capture()
    return lm


def test_on_a_cpu_nothing_is_captured(make_model: Any) -> None:
    model = make_model("llama")
    assert decoding_runner(model, prepare(model)).captured is None
    assert decoding_runner(model, prepare(model), (4, 8)).buckets == (4, 8)


@pytest.mark.parametrize(
    ("kind", "positions", "passes"), [("llama", 4096, 21), ("gemma3", 4096, 21), ("gpt2", 512, 15)]
)
def test_the_passes_of_a_small_batch_are_warm_and_agree_with_eager_ones(
    make_model: Any, kind: str, positions: int, passes: int
) -> None:
    """Of 1 to 64 tokens behind contexts that the arena has slots for, as far as the model has positions for them; and
    the pass that was compared."""
    lm = static_runner(make_model(kind, max_position_embeddings=positions))
    assert lm.captured is not None
    warm_up(lm, 1024)
    assert captured_error(lm) < 1e-6
    assert not lm.captured.refusal
    assert lm.cache.size in (1024, 1025)
    held = len(lm.captured)
    assert held == passes
    generation = lm.cache.generation
    for row, length in enumerate((3, 150, 300)):
        lm.open(row)
        lm.prefill([row], [[3 + i % 50 for i in range(length)]])
        for tokens in (3, 40, 64):
            lm.forward([row], [Entries([6] * tokens, [-1] * tokens)])
            lm.drop([row])
        lm.close(row)
    assert lm.cache.generation == generation
    assert len(lm.captured) == held, "a pass of a small batch was not warm"


def test_passes_that_differ_from_eager_ones_are_refused_with_a_reason(
    make_model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model("llama")
    lm = static_runner(model)
    plant(monkeypatch, StaticReads, "_seen", "rank_L < counts_S", "rank_L < 1 + 0 * counts_S")
    with caplog.at_level(logging.WARNING):
        warm_up(lm, 512)
    assert [record.getMessage().partition(" by")[0] for record in caplog.records] == [
        "llama: passes run without CUDA graphs: they differ from eager ones"
    ]
    lm.open("a")
    lm.prefill(["a"], [[3, 4]])
    found_V = lm.forward(["a"], [Entries.chain([5])]).logits_NV[0]
    with torch.inference_mode():
        torch.testing.assert_close(found_V, model(torch.tensor([[3, 4, 5]])).logits[0, -1], rtol=0, atol=1e-9)


def test_what_cannot_be_captured_runs_eagerly_and_says_so_once(
    make_model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a device whose capture fails. Nothing else here takes this path without one."""
    model = make_model("llama")
    lm = static_runner(model)

    def fail(self: CapturedPasses, run: Callable[[], Any]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(CapturedPasses, "_capture", fail)
    monkeypatch.setattr(CapturedPasses, "_on_device", lambda self: True)
    with caplog.at_level(logging.WARNING):
        lm.open("a")
        lm.prefill(["a"], [[3, 4]])
        for _ in range(2):
            found_V = lm.forward(["a"], [Entries.chain([5])]).logits_NV[0]
            lm.drop(["a"])
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().endswith("not permitted when stream is capturing")
    with torch.inference_mode():
        torch.testing.assert_close(found_V, model(torch.tensor([[3, 4, 5]])).logits[0, -1], rtol=0, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_passes_give_the_logits_of_eager_ones_on_cuda(make_model: Any, kind: str, dtype: torch.dtype) -> None:
    model = make_model(kind, torch.float32).to("cuda", dtype)
    plan = prepare(model)
    eager, graphs = ModelRunner(model, plan), ModelRunner(copy.deepcopy(model), plan)
    assert graphs.capture()
    prompts = {row: [3 + (5 * i + row) % 50 for i in range(20 + 30 * row)] for row in range(3)}
    for lm in (eager, graphs):
        for row in prompts:
            lm.open(row)
        lm.prefill(list(prompts), list(prompts.values()))
    for _ in range(12):
        entries = [Entries([5, 6, 7], [-1, 0, 0]) for _ in prompts]
        found, wanted = (lm.forward(list(prompts), entries).logits_NV for lm in (graphs, eager))
        spread = float(wanted.std())
        torch.testing.assert_close(
            found / spread, wanted / spread, rtol=0, atol=1e-3 if dtype == torch.float32 else 0.1
        )
        for lm in (eager, graphs):
            lm.commit(list(prompts), [[0, 2]] * 3)
    assert graphs.captured is not None
    assert not graphs.captured.refusal
    assert len(graphs.captured) >= 1
