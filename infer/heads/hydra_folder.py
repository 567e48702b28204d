"""Hydra heads in folders, as their authors publish them: `hydra_mlp.{head}.{at}.*` and `hydra_lm_head.{head}[.1].*`.

Positions within a head skip dropouts. Later blocks of a head are one module that comes several times.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from draftsmith.infer.heads.head_files import HeadFiles, fit, uniform
from draftsmith.infer.heads.hydra import HydraHeads
from draftsmith.infer.heads.medusa_folder import check_width

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
    names = {name: _module_name(name, order) for name in files.shapes}
    weights = uniform({names[name]: one for name, one in files.read(names, dtype).items()})
    output = weights["heads.0.lm_head.weight"]
    first = weights["heads.0.blocks.0.linear.weight"]
    if first.shape[1] == output.shape[1]:
        raise ValueError(f"{files.name} has grounded_heads false: heads that read no tokens are not built here")
    with torch.device("meta"):
        module = HydraHeads(output.shape[1], output.shape[0], len(outputs), depths.pop())
    fit(module, weights, files.name)
    check_width(files.name, output.shape[1], output.shape[0], target_config)
    return module


def _module_name(name: str, order: dict[int, list[int]]) -> str:
    if match := BLOCK.fullmatch(name):
        head, place = int(match[1]), int(match[2])
        return f"heads.{head}.blocks.{order[head].index(place)}.{match[3]}"
    if match := OUTPUT.fullmatch(name):
        return f"heads.{match[1]}.lm_head.{match[2]}"
    return name


def hydra_tensors(module: HydraHeads) -> dict[str, torch.Tensor]:
    found = {}
    for i, head in enumerate(module.heads):
        for name, one in head.state_dict().items():
            kind, _, rest = name.partition(".")
            found[f"hydra_lm_head.{i}.{rest}" if kind == "lm_head" else f"hydra_mlp.{i}.{rest}"] = one
    return found


def hydra_config(module: HydraHeads, target: str) -> dict[str, Any]:
    return {
        "hydra_num_heads": len(module.heads),
        "hydra_num_layers": module.num_layers,
        "hydra_head_arch": "mlp",
        "grounded_heads": True,
        "hidden_size": module.width,
        "vocab_size": module.vocab_size,
        "base_model_name_or_path": target,
        "dtype": str(next(module.parameters()).dtype).removeprefix("torch."),
    }
