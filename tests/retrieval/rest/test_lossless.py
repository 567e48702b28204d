"""Losslessness of the sparse drafter: token-identical to plain decoding in float64, greedy and sampled, in batches.

The store holds the prompts and the model's own plain answers, some of their tokens changed, so that drafts are accepted
deep and rejected; every test asserts that its own run did both, and varied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from decoded import assert_tried_hard, tokens

from draftsmith.infer.contract.protocols import Drafter
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.models.hf_target import HFTarget

ARCHITECTURES = ["llama", "gpt2", "gemma2"]
SETTINGS = {
    "greedy": Settings(),
    "sampled": Settings(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, seed=11),
    "penalised": Settings(repetition_penalty=1.3, no_repeat_ngram_size=4, min_new_tokens=4),
}
VOCAB = 61


def make_rows(settings: Settings) -> list[Row]:
    """Eight prompts of uneven length, whose rows end at different times."""
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (3, 30, 8, 17, 25, 4, 12, 39)]
    return [Row(str(i), prompt, settings, Stops(40 - 3 * i)) for i, prompt in enumerate(prompts)]


def decode(model: Any, drafter: Drafter, settings: Settings, batch_size: int = 1) -> list[Generation]:
    target = HFTarget(model)
    drafter.bind(target)
    return generate(target, drafter, make_rows(settings), batch_size=batch_size)


def corrupted(ids: list[int], generator: torch.Generator) -> list[int]:
    """One token in eight replaced."""
    changed = torch.rand(len(ids), generator=generator) < 0.125
    others = torch.randint(3, VOCAB, (len(ids),), generator=generator).tolist()
    return [other if change else token for token, other, change in zip(ids, others, changed)]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, make_model: Any) -> Any:
    return make_model(request.param)


@pytest.mark.parametrize("kind", SETTINGS)
def test_tokens_equal_plain_decoding_in_any_batch(model: Any, kind: str, tmp_path: Path, retrieval: Any) -> None:
    settings = SETTINGS[kind]
    plain = tokens(decode(model, Empty(), settings))
    generator = torch.Generator().manual_seed(3)
    documents = [corrupted(row.ids + answer, generator) for row, answer in zip(make_rows(settings), plain)]
    store = retrieval.write_store(tmp_path / "store", documents, vocab=VOCAB, chunk=150)
    for batch_size in (1, 3, 8):
        drafter = retrieval.Rest(str(store), nodes=24, threads=2 if batch_size == 3 else 1)
        generations = decode(model, drafter, settings, batch_size)
        assert tokens(generations) == plain
        assert_tried_hard(generations, deep=4)
