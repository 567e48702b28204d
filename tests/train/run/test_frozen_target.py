"""The type that a frozen target runs in while a draft is trained for it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.infer.models.hf_target import model_fingerprint
from draftsmith.infer.models.load import load_model
from draftsmith.train.run.run import load_frozen


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("fast", "device"), [(False, "cpu"), (True, "cpu"), (False, "cuda")])
def test_half_precision_is_widened_only_where_it_is_slow(
    target_folder: Path, tmp_path: Path, monkeypatch: Any, stored: torch.dtype, fast: bool, device: str
) -> None:
    monkeypatch.setattr("draftsmith.infer.models.products.prepack.multiplies_bfloat16", lambda: fast)
    model, tokenizer = load_model(str(target_folder))
    model.to(stored).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_frozen(str(tmp_path), device)
    slow = stored != torch.float64 and not fast and device == "cpu"
    assert loaded.dtype == (torch.float32 if slow else stored)
    if stored == torch.bfloat16:  # caches and heads recognise it
        assert model_fingerprint(loaded) == model_fingerprint(load_model(str(tmp_path))[0])
