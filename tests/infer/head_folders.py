"""Tiny random heads, and folders of them as other projects write them. Not tests: what tests share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from draftsmith.infer.heads.eagle import EagleDesign, EagleHead, rows_of
from draftsmith.infer.heads.eagle_export import eagle_config, eagle_tensors

VOCAB, WIDTH, LAYERS = 61, 32, 9
FEATURES = ("layer:2", "layer:4", "layer:6")  # the default ones of LAYERS layers
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


def target_config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**SIZES | {"num_hidden_layers": LAYERS, "rope_theta": 777.0} | changes)


def randomised(module: torch.nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_((1.0 if "norm" in name else 0.0) + 0.2 * noise)
    return module.eval()


def eagle3(
    ids: bool = True,
    own_embedding: bool = False,
    layers: int = 1,
    seed: int = 0,
    kind: Any = LlamaConfig,
    **design: Any,
) -> EagleHead:
    """A head of version 3; with `ids`, a third of the vocabulary. `kind`: the config of its layers."""
    wired = EagleDesign(3, design.pop("features", FEATURES), design.pop("feature_width", WIDTH), **design)
    config = kind(**SIZES | {"num_hidden_layers": layers, "head_dim": 8})
    ids_V = rows_of(range(1, VOCAB, 3), VOCAB) if ids else None
    return randomised(EagleHead(config, wired, ids_V, own_embedding), seed)


def eagle1(bias: bool = True, own_embedding: bool = False) -> EagleHead:
    design = EagleDesign(1, ("last",), WIDTH, fc_bias=bias)
    return randomised(EagleHead(LlamaConfig(**SIZES), design, None, own_embedding, own_head=False))


def folder_of(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None,
    weights: str = "model.safetensors",
) -> Path:
    """A folder with these tensors and this config."""
    path.mkdir(parents=True, exist_ok=True)
    held = {name: one.detach().clone().contiguous() for name, one in tensors.items()}
    if weights.endswith(".safetensors"):
        save_file(held, path / weights, metadata={"format": "pt"})
    else:
        torch.save(held, path / weights)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def flat(head: EagleHead) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and config of the flat format, without what says where they came from."""
    return eagle_tensors(head), eagle_config(head, LAYERS)


def nested(head: EagleHead) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and config of a speculators folder, which leaves out what is LlamaConfig's default."""
    layer = {key: value for key, value in SIZES.items() if key != "hidden_act"} | {"model_type": "llama"}
    switches = {key: getattr(head.design, key) for key in ("norm_before_residual", "norm_output", "norm_before_fc")}
    config = {
        "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "draft_vocab_size": 20,
        "eagle_aux_hidden_state_layer_ids": [2, 4, 6], "speculators_config": {"algorithm": "eagle3"},
        "transformer_layer_config": layer, "fc_norm": head.design.fc_norm, **switches,
    }  # fmt: skip
    return eagle_tensors(head, "speculators"), config


def said(head: Any, seed: int = 5, pairs: int = 7) -> torch.Tensor:
    """[N, V] what a head says of random pairs, with an embedding and a head that are lent."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(head.parameters()).dtype
    width = getattr(getattr(head, "design", None), "feature_width", WIDTH)
    features = {name: torch.randn((pairs, width), generator=generator).to(dtype) for name in head.features}
    embedding, output = torch.nn.Embedding(VOCAB, WIDTH), torch.nn.Linear(WIDTH, VOCAB, bias=False)
    head.lend(randomised(embedding, 1).to(dtype), randomised(output, 2).to(dtype))
    tokens = torch.randint(VOCAB, (pairs,), generator=generator)
    causal = torch.full((pairs, pairs), -1e9, dtype=dtype).triu(1)[None, None]
    places = torch.arange(pairs)[None]
    with torch.no_grad():
        given = head.pairs(tokens, head.joined(features))[None]
        logits: torch.Tensor = head(inputs_embeds=given, position_ids=places, attention_mask=causal).logits[0]
    return logits
