"""Calls of `generate` with and without drafting, for the tests of speculative(...). Not tests themselves."""

from __future__ import annotations

import copy
from typing import Any

import torch

from draftsmith.infer.drafters import SmallLM

NEW = 50


def small(draft: Any) -> Any:
    return SmallLM(draft, num_draft_tokens=5, top_k=2, min_confidence=0.0)


def batch(rows: int, seed: int = 7, vocab: int = 61) -> dict[str, torch.Tensor]:
    """Left-padded prompts of uneven length, half of each repeated."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for row in range(rows):
        half = torch.randint(3, vocab, (5 + 4 * row,), generator=generator).tolist()
        texts.append(half * 2)
    width = max(len(text) for text in texts)
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    return {"input_ids": ids, "attention_mask": mask}


def both(model: Any, call: Any, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What `generate` gives without and with drafting."""
    given = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | arguments
    plain = model.generate(**copy.deepcopy(given))
    return plain, model.generate(**given, custom_generate=call)
