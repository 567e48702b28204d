"""MTP heads in a target's own checkpoint. transformers drops their tensors when it loads the model, so they are read
from the files; the layer is the one that transformers builds for the family."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from draftsmith.infer.files.errors import first_line
from draftsmith.infer.heads.head_files import HeadFiles, fit
from draftsmith.infer.heads.mtp import MTPHead, MTPStack
from draftsmith.infer.heads.rotary import KeptRotary
from draftsmith.infer.models.layers import picked_config


@dataclass(frozen=True, slots=True)
class MTPLayout:
    """Where a family keeps its head. `prefix` may name the number of the target's layers, {L}. `layer`: of the decoder
    layer under it; the others map names in the checkpoint to MTPHead's. `shared`: copies of what the target lends."""

    prefix: str
    layer: str
    names: Mapping[str, str]
    shared: tuple[str, ...] = ()
    blank_first: bool = False


QWEN = MTPLayout(
    "mtp.",
    "layers.0.",
    {
        "pre_fc_norm_embedding.": "embedding_norm.",
        "pre_fc_norm_hidden.": "state_norm.",
        "fc.": "fc.",
        "norm.": "model.norm.",
    },
)
DEEPSEEK = MTPLayout(
    "model.layers.{L}.",
    "",
    {"enorm.": "embedding_norm.", "hnorm.": "state_norm.", "eh_proj.": "fc.", "shared_head.norm.": "model.norm."},
    shared=("embed_tokens.", "shared_head.head."),
    blank_first=True,
)
# By the model_type of the text model.
LAYOUTS = {
    "qwen3_next": QWEN,
    "qwen3_5_text": QWEN,
    "qwen3_5_moe_text": QWEN,
    "deepseek_v3": DEEPSEEK,
    "glm4_moe": DEEPSEEK,
    "glm4_moe_lite": DEEPSEEK,
}
EXPERT = re.compile(r"(.*mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
KINDS = ("gate", "up", "down")
QUANTISED = ("weight_scale", "weight_scale_inv", "qweight", "weight_packed", "scales")


def load_mtp(name: str | Path, target_config: Any | None = None, dtype: str = "auto") -> MTPHead:
    """The head in the checkpoint of a target, a folder or Hub name."""
    files = HeadFiles.open(name)
    text = (target_config if target_config is not None else _config(files)).get_text_config()
    layout = LAYOUTS.get(text.model_type)
    if layout is None:
        raise ValueError(_no_layout(files, text))
    prefix = layout.prefix.format(L=text.num_hidden_layers)
    names = {key: key.removeprefix(prefix) for key in files.shapes if key.startswith(prefix)}
    if not names:
        raise ValueError(f"{name} brings no MTP head: it has no tensors {prefix}*")
    _check(files, text, layout, set(names.values()))
    names = {key: short for key, short in names.items() if not short.startswith(layout.shared or "\0")}
    weights = _fused({_module_name(names[key], layout): one for key, one in files.read(names, dtype).items()})
    head = _built(text, any(".experts." in short for short in names.values()), layout.blank_first)
    fit(head, weights, str(name))
    return head


def _config(files: HeadFiles) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(files.folder)
    except (OSError, ValueError, KeyError) as problem:
        raise ValueError(f"{files.name}: its config cannot be read: {first_line(problem)}") from problem


def _no_layout(files: HeadFiles, text: Any) -> str:
    beyond = f"model.layers.{text.num_hidden_layers}."
    if any(key.startswith(("mtp", "model.mtp", beyond)) for key in files.shapes):
        return (
            f"{files.name} brings an MTP head, but those of {text.model_type} are not built here; built are those of "
            f"{', '.join(LAYOUTS)}"
        )
    return f"{files.name} brings no MTP head"


def _check(files: HeadFiles, text: Any, layout: MTPLayout, names: set[str]) -> None:
    """Refuse heads of several layers, and quantised ones."""
    second = "layers.1." if layout.layer else f"model.layers.{text.num_hidden_layers + 1}."
    if any(name.startswith(second) for name in (names if layout.layer else files.shapes)):
        raise ValueError(f"{files.name} brings several MTP layers, one for each depth: only a single one is run here")
    scaled = sorted(name for name in names if name.endswith(QUANTISED))
    if scaled:
        raise ValueError(f"{files.name} brings a quantised MTP head ({scaled[0]}): only plain weights are read")


def _module_name(name: str, layout: MTPLayout) -> str:
    for old, new in layout.names.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return "model.layers.0." + name.removeprefix(layout.layer)


def _fused(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts as transformers holds them: gate and up of all experts in one tensor, down in another."""
    parts: dict[str, dict[tuple[str, int], torch.Tensor]] = {}
    found = {}
    for name, one in weights.items():
        match = EXPERT.fullmatch(name)
        if match:
            parts.setdefault(match[1], {})[match[3], int(match[2])] = one
        else:
            found[name] = one
    for where, held in parts.items():
        numbers = sorted({number for _, number in held})
        if missing := [f"{number}.{kind}" for number in numbers for kind in KINDS if (kind, number) not in held]:
            raise ValueError(f"an MTP head lacks {where}.{missing[0]}_proj.weight: copy or download it again")
        both = [torch.cat([held["gate", number], held["up", number]]) for number in numbers]
        found[f"{where}.gate_up_proj"] = torch.stack(both)
        found[f"{where}.down_proj"] = torch.stack([held["down", number] for number in numbers])
    return found


def _built(text: Any, experts: bool, blank_first: bool) -> MTPHead:
    """An empty head: the one layer, norm and rotation of a model of the target's family."""
    from transformers import AutoModelForCausalLM

    config = picked_config(text, [0])
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"]
    if getattr(config, "mlp_layer_types", None):
        config.mlp_layer_types = ["sparse" if experts else "dense"]
    if hasattr(config, "first_k_dense_replace"):
        config.first_k_dense_replace = 0 if experts else 1
    if hasattr(config, "mlp_only_layers"):
        config.mlp_only_layers = [] if experts else [0]
    own = getattr(text, "_experts_implementation", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **({"experts_implementation": own} if own else {})).model
        stack = MTPStack(model.layers[0], model.norm, model.rotary_emb)
        norm, other = copy.deepcopy(model.norm), copy.deepcopy(model.norm)
        head = MTPHead(model.config, stack, norm, other, blank_first)
    head.model.rotary_emb = KeptRotary(type(model.rotary_emb)(model.config))
    return head
