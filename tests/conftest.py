"""Fixtures: tiny random targets of every supported family, a byte tokenizer, rows, and the drafters that every promise
is tried with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_folders import Folders, build

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# For the processes that tests start: idle threads of theirs would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The models are tiny: a second thread only waits for the first.
torch.set_num_threads(1)

VOCAB = 61

_COMMON = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
           "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
           "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15,
           "tie_word_embeddings": False}  # fmt: skip


def _tiny_configs() -> dict[str, Callable[[], Any]]:
    import transformers as hf

    gpt = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "bos_token_id": 1,
           "eos_token_id": 2, "initializer_range": 0.15, "tie_word_embeddings": False}  # fmt: skip
    gemma = {**_COMMON, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}
    both = ["sliding_attention", "full_attention"]
    return {
        "llama": lambda: hf.LlamaConfig(**_COMMON),
        "mistral": lambda: hf.MistralConfig(**_COMMON, sliding_window=16, head_dim=8),
        "gemma2": lambda: hf.Gemma2Config(**gemma, layer_types=both),
        "gemma3": lambda: hf.Gemma3TextConfig(**gemma, layer_types=both),
        "qwen2": lambda: hf.Qwen2Config(**_COMMON),
        "qwen3": lambda: hf.Qwen3Config(**_COMMON, head_dim=8),
        "phi3": lambda: hf.Phi3Config(**_COMMON),
        "mixtral": lambda: hf.MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2),
        "gpt_neox": lambda: hf.GPTNeoXConfig(**_COMMON),
        "gpt2": lambda: hf.GPT2Config(**gpt),
        "opt": lambda: hf.OPTConfig(
            **{**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.15, "dropout": 0.0}
        ),
    }


def tiny_model(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
    """A random two-layer model whose greedy text varies: weights are wide, so that logits are far apart."""
    from transformers import AutoModelForCausalLM

    config = _tiny_configs()[kind]()
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Grouped matrix products of experts know no float64.
        experts = {"experts_implementation": "eager"} if kind == "mixtral" else {}
        model = AutoModelForCausalLM.from_config(config, **experts)
    return model.to(dtype).eval()


def shaken(model: Any, amount: float, seed: int = 1) -> Any:
    """A copy with noise on its weights: a draft model that is right often, and wrong often."""
    import copy

    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((noise * amount * parameter.double().std().nan_to_num(0)).to(parameter))
    return other


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    return tiny_model


@pytest.fixture(scope="session")
def shake() -> Callable[..., Any]:
    return shaken


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A tiny target on disk, and drafts that fit it and that do not."""
    return build(tmp_path_factory.mktemp("tiny"), shaken)


@pytest.fixture(autouse=True)
def _quiet_threads() -> Iterator[None]:
    """Tests must not depend on the state of torch's own generator, nor change it for one another."""
    with torch.random.fork_rng(devices=[]):
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a CUDA device are left out, with the reason, where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
