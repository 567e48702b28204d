"""A target over two CUDA devices, over NCCL, decodes what it decodes on one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from over_ranks import saved
from tiny_models import tiny_model

from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.models.load import load_target


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_two_devices_decode_what_one_decodes(tmp_path: Path, temperature: float) -> None:
    folder = saved(tmp_path / "target", tiny_model("llama"), torch.float32)
    prompts = [[5, 9, 33, 20, 5, 9, 33, 7, 5, 9], [3, 4, 5], list(range(3, 50))]
    found = []
    for tp in (1, 2):
        target = load_target(folder, tp=tp)
        target.tokenizer = None
        with Engine(target, "pld", batch_size=2) as engine:
            done = engine.generate(prompts, max_new_tokens=40, temperature=temperature, seed=3)
        target.close()
        assert not any(one.error for one in done)
        found.append([one.token_ids for one in done])
    assert found[1] == found[0]
