"""Models, machines and starts that give no ranks are refused before any weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model

from draftsmith.infer.models.load import check_model


@pytest.fixture
def folder_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder with a config and no weights, on a machine without CUDA devices."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def make(kind: str, **changes: Any) -> str:
        tiny_model(kind).config.save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return str(tmp_path)

    return make


@pytest.mark.parametrize(
    ("kind", "changes", "tp", "expected"),
    [
        ("llama", {}, 8, "num_attention_heads=4, fewer than ranks"),
        ("llama", {}, 4, "num_key_value_heads=2, fewer than ranks"),
        ("llama", {"num_attention_heads": 8, "num_key_value_heads": 8}, 3, "num_attention_heads=8, which 3 does not"),
        ("llama", {"intermediate_size": 47}, 2, "the width 47 of model.layers.0.mlp.gate_proj does not divide by 2"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, 2, "its weights are quantised"),
        ("gpt2", {}, 2, "no tensor-parallel plan for gpt2"),
        ("qwen3", {"layer_types": ["linear_attention", "full_attention"]}, 2, "recurrent layers"),
    ],
)
def test_a_model_that_cannot_be_split(folder_of: Any, kind: str, changes: Any, tp: int, expected: str) -> None:
    folder = folder_of(kind, **changes)
    with pytest.raises(ValueError, match=expected) as refused:
        check_model(folder, tp=tp)
    assert str(refused.value).startswith(f"{folder} cannot be split over {tp} ranks: ")


def test_a_model_that_can_be_split_is_not_refused(folder_of: Any) -> None:
    check_model(folder_of("llama"), tp=2)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"WORLD_SIZE": "3"}, "--tp 2, but WORLD_SIZE is 3"),
        ({"WORLD_SIZE": "2"}, "not RANK and MASTER_ADDR and MASTER_PORT: start with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, "not MASTER_ADDR: start with torchrun"),
    ],
)
def test_half_a_launcher(folder_of: Any, monkeypatch: pytest.MonkeyPatch, variables: Any, expected: str) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=expected):
        check_model(folder_of("llama"), tp=2)


def test_a_device_with_a_number(folder_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("draftsmith.infer.models.load.choose_device", lambda name: None)
    with pytest.raises(ValueError, match="one device each"):
        check_model(folder_of("llama"), device="cuda:1", tp=2)


def test_fewer_devices_than_ranks(folder_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of("llama")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ValueError, match="--tp 2 needs 2 CUDA devices on this machine; it has 1"):
        check_model(folder, tp=2)
