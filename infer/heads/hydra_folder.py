"""Hydra heads in folders, as their authors publish them: `hydra_mlp.{head}.{at}.*`, `hydra_lm_head.{head}[.1].*`, and
`prefix_embeding_layer.*` of Hydra++ (the spelling is theirs).

Positions within a head skip dropouts. Later blocks of a head are one module that comes several times.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from draftsmith.infer.heads.eagle_export import layer_fields
from draftsmith.infer.heads.head_files import HeadFiles, fit, uniform
from draftsmith.infer.heads.hydra import HydraHeads
from draftsmith.infer.heads.medusa_folder import check_width
from draftsmith.infer.heads.rotary import KeptRotary

BLOCK = re.compile(r"hydra_mlp\.(\d+)\.(\d+)\.((?:linear|res_connection)\.(?:weight|bias))")
OUTPUT = re.compile(r"hydra_lm_head\.(\d+)(?:\.1)?\.(weight|bias)")
PREFIX = "prefix_embeding_layer."


def read_hydra(files: HeadFiles, target_config: Any | None, dtype: str) -> HydraHeads:
    at = {(int(m[1]), int(m[2])) for m in map(BLOCK.fullmatch, files.shapes) if m}
    outputs = {int(m[1]) for m in map(OUTPUT.fullmatch, files.shapes) if m}
    if not at or outputs != {head for head, _ in at}:
        raise ValueError(f"{files.name} is no Hydra head: hydra_mlp.* and hydra_lm_head.* are not of the same heads")
    order = {head: sorted(place for one, place in at if one == head) for head in outputs}
    depths = {len(places) for places in order.values()}
    if len(depths) > 1:
        raise ValueError(f"{files.name}: its heads have {min(depths)} to {max(depths)} blocks: tensors are missing")
    # The prefix layer is published as a whole model; its embedding is never read.
    names = {name: _module_name(name, order) for name in files.shapes if name != f"{PREFIX}embed_tokens.weight"}
    prefixed = any(name.startswith(PREFIX) for name in names)
    weights = uniform({names[name]: one for name, one in files.read(names, dtype).items()})
    output = weights["heads.0.lm_head.weight"]
    first = weights["heads.0.blocks.0.linear.weight"]
    if first.shape[1] == output.shape[1]:
        raise ValueError(f"{files.name} has grounded_heads false: heads that read no tokens are not built here")
    prefix = _prefix_config(files, target_config) if prefixed else None
    with torch.device("meta"):
        module = HydraHeads(output.shape[1], output.shape[0], len(outputs), depths.pop(), prefix)
    if module.prefix is not None:
        module.prefix.model.rotary_emb = KeptRotary(LlamaRotaryEmbedding(module.prefix.config))
    fit(module, weights, files.name)
    check_width(files.name, output.shape[1], output.shape[0], target_config)
    return module


def _prefix_config(files: HeadFiles, target_config: Any | None) -> LlamaConfig:
    """The config of the prefix layer: in our own folders, else the target's, for whose layers it is made."""
    own = files.config.get("prefix_config")
    if isinstance(own, dict):
        return LlamaConfig(**own)
    if target_config is None:
        raise ValueError(f"{files.name} has a prefix layer of the target's shape: load it together with the target")
    text = target_config.get_text_config()
    if text.model_type != "llama":
        raise ValueError(f"{files.name} has a prefix layer of Llama's, and the target is a {text.model_type}")
    return LlamaConfig(**{**text.to_dict(), "num_hidden_layers": 1})


def _module_name(name: str, order: dict[int, list[int]]) -> str:
    if match := BLOCK.fullmatch(name):
        head, place = int(match[1]), int(match[2])
        return f"heads.{head}.blocks.{order[head].index(place)}.{match[3]}"
    if match := OUTPUT.fullmatch(name):
        return f"heads.{match[1]}.lm_head.{match[2]}"
    return re.sub(f"^{PREFIX}", "prefix.model.", name)


def hydra_tensors(module: HydraHeads) -> dict[str, torch.Tensor]:
    found = {}
    for i, head in enumerate(module.heads):
        for name, one in head.state_dict().items():
            kind, _, rest = name.partition(".")
            found[f"hydra_lm_head.{i}.{rest}" if kind == "lm_head" else f"hydra_mlp.{i}.{rest}"] = one
    if module.prefix is not None:
        found |= {f"{PREFIX}{name}": one for name, one in module.prefix.model.state_dict().items()}
    return found


def hydra_config(module: HydraHeads, target: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "hydra_num_heads": len(module.heads),
        "hydra_num_layers": module.num_layers,
        "hydra_head_arch": "mlp" if module.prefix is None else "prefix-mlp",
        "grounded_heads": True,
        "hidden_size": module.width,
        "vocab_size": module.vocab_size,
        "base_model_name_or_path": target,
        "dtype": str(next(module.parameters()).dtype).removeprefix("torch."),
    }
    if module.prefix is not None:
        fields = layer_fields(module.prefix.config) | {"rope_parameters": dict(module.prefix.config.rope_parameters)}
        found["prefix_config"] = fields
    return found
