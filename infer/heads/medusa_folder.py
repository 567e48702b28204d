"""Medusa heads in folders: v0.1 (heads alone), v1.0 (a whole model, heads under `medusa_head.`), vLLM's.

The config's number of heads is not to be trusted: published ones say 2 where there are 5. Tensors are counted.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import torch

from draftsmith.infer.heads.head_files import HeadFiles, fit, uniform
from draftsmith.infer.heads.medusa import MedusaHeads

log = logging.getLogger(__name__)

PREFIX = "medusa_head."
BLOCK = re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)")
OUTPUT = re.compile(r"(\d+)\.(\d+)\.weight")
VLLM_BLOCK = re.compile(r"blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)")
VLLM_OUTPUT = re.compile(r"lm_heads\.(\d+)\.weight")


def read_medusa(files: HeadFiles, target_config: Any | None, dtype: str) -> MedusaHeads:
    whole = any(name.startswith(PREFIX) for name in files.shapes)
    names = {name: name.removeprefix(PREFIX) for name in files.shapes if not whole or name.startswith(PREFIX)}
    if whole and len(names) < len(files.shapes):
        log.warning(
            "%s holds a whole model: only its heads are read, and they fit the model they were trained with", files.name
        )
    tensors = files.read(names, dtype)
    weights = uniform({module_name(names[name]): one for name, one in tensors.items()})
    heads = {int(key.split(".")[1]) for key in weights if key.startswith("heads.")}
    blocks = {int(key.split(".")[3]) for key in weights if ".blocks." in key}
    output = weights.get("heads.0.lm_head.weight")
    if output is None or not blocks:
        raise ValueError(f"{files.name} is no Medusa head: it lacks 0.0.linear.weight or the output matrix of head 0")
    for name in [name for name in weights if name.endswith("linear.weight")]:
        if "medusa_fc_bias" in files.config and not files.config["medusa_fc_bias"]:
            weights.setdefault(name.replace("weight", "bias"), torch.zeros(output.shape[1], dtype=output.dtype))
    with torch.device("meta"):
        module = MedusaHeads(output.shape[1], output.shape[0], len(heads), len(blocks))
    fit(module, weights, files.name)
    check_width(files.name, output.shape[1], output.shape[0], target_config)
    return module


def module_name(name: str) -> str:
    """The name in MedusaHeads of a tensor in a folder; its own if it is none of Medusa's."""
    if match := BLOCK.fullmatch(name):
        return f"heads.{match[1]}.blocks.{match[2]}.linear.{match[3]}"
    if match := VLLM_BLOCK.fullmatch(name):
        return f"heads.{match[1]}.blocks.{match[2]}.linear.{match[3]}"
    if match := OUTPUT.fullmatch(name) or VLLM_OUTPUT.fullmatch(name):
        return f"heads.{match[1]}.lm_head.weight"
    return name


def medusa_tensors(module: MedusaHeads) -> dict[str, torch.Tensor]:
    """The weights under the names of v0.1."""
    found = {}
    for i, head in enumerate(module.heads):
        for name, one in head.state_dict().items():
            kind, _, rest = name.partition(".")
            found[f"{i}.{module.num_layers}.weight" if kind == "lm_head" else f"{i}.{rest}"] = one
    return found


def check_width(name: str, width: int, vocab_size: int, target_config: Any | None) -> None:
    """Refuse heads of another target, by the width of its states and the size of its vocabulary."""
    if target_config is None:
        return
    text = target_config.get_text_config()
    if width != text.hidden_size:
        raise ValueError(
            f"{name} reads states of width {width}, and the target's are {text.hidden_size} wide: they are another "
            "target's heads"
        )
    if vocab_size > text.vocab_size:
        raise ValueError(f"{name} drafts {vocab_size} tokens, and the target has {text.vocab_size}")


def medusa_config(module: MedusaHeads, target: str) -> dict[str, Any]:
    """v0.1's keys, and those by which engines know the sizes."""
    return {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "medusa_num_heads": len(module.heads),
        "num_heads": len(module.heads),
        "medusa_num_layers": module.num_layers,
        "num_hidden_layers": module.num_layers,
        "medusa_fc_bias": True,
        "hidden_size": module.width,
        "vocab_size": module.vocab_size,
        "base_model_name_or_path": target,
        "dtype": str(next(module.parameters()).dtype).removeprefix("torch."),
    }
