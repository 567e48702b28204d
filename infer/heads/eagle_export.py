"""EAGLE heads as other projects read them: the flat format of vLLM and SGLang, and speculators'."""

from __future__ import annotations

import re
from typing import Any, Literal

import torch

from draftsmith.infer.heads.eagle import EagleHead, HeadConfig, default_features
from draftsmith.infer.heads.eagle_folder import LAYER_IDS, SWITCHES

Layout = Literal["flat", "speculators"]


def eagle_tensors(head: EagleHead, layout: Layout = "flat") -> dict[str, torch.Tensor]:
    """The weights under the names of a format; in the flat one, a single layer has EAGLE's own name for it."""
    found: dict[str, torch.Tensor] = {}
    for name, one in head.state_dict().items():
        name = re.sub(r"^fc_norms\.", "fc_norm.", name.removeprefix("model."))
        if layout == "flat" and head.design.version == 3 and head.config.num_hidden_layers == 1:
            name = re.sub(r"^layers\.0\.", "midlayer.", name)
        found[name] = one
    if head.ids_V is not None:
        found["d2t"] = head.ids_V - torch.arange(len(head.ids_V), device=head.ids_V.device)
        found["t2d"] = torch.zeros(head.config.vocab_size, dtype=torch.bool)
        found["t2d"][head.ids_V.cpu()] = True
    return found


def eagle_config(head: EagleHead, target_layers: int = 0) -> dict[str, Any]:
    """The flat format's config. Layer ids are left out where they are the default ones of `target_layers`: engines
    disagree on what they count."""
    config, design = head.config, head.design
    rope = dict(config.rope_parameters)
    found: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3" if design.version == 3 else "LlamaForCausalLM"],
        "model_type": config.model_type,
        **layer_fields(config),
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": rope if rope.get("rope_type", "default") != "default" else None,
        "tie_word_embeddings": False,
        "dtype": str(head.fc.weight.dtype).removeprefix("torch."),
        "bias": design.fc_bias,
    }
    if design.version == 3:
        found["draft_vocab_size"] = config.vocab_size if head.ids_V is None else len(head.ids_V)
        found["target_hidden_size"] = design.feature_width
        found |= {switch: getattr(design, switch) for switch in SWITCHES}
        if len(design.features) != 3:
            found["num_aux_hidden_states"] = len(design.features)
        if not target_layers or design.features != default_features(target_layers):
            found[LAYER_IDS] = layer_ids(head)
    return found


def layer_fields(config: HeadConfig) -> dict[str, Any]:
    """What a config says of the decoder layers, apart from their rotations."""
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings", "vocab_size", "attention_bias", "mlp_bias",
    )  # fmt: skip
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def layer_ids(head: EagleHead) -> list[int]:
    """The layers before which the head's states lie; ValueError if it reads others."""
    numbers = [one.partition(":") for one in head.features]
    if any(kind != "layer" for kind, _, _ in numbers):
        raise ValueError(f"states {', '.join(head.features)} cannot be written as layer ids: use layer:k only")
    return [int(number) for _, _, number in numbers]


def speculators_config(head: EagleHead, target: str, architectures: list[str], num_draft_tokens: int) -> dict[str, Any]:
    """The config of a speculators folder; ValueError for a head that its design does not know."""
    design = head.design
    if design.version != 3 or design.fc_bias:
        raise ValueError("speculators has EAGLE-3 heads without fc.bias only")
    if design.feature_width != head.config.hidden_size:
        raise ValueError(
            f"speculators has heads as wide as their target only: {head.config.hidden_size} is not "
            f"{design.feature_width}"
        )
    proposal = {"proposal_type": "greedy", "speculative_tokens": num_draft_tokens}
    rope = dict(head.config.rope_parameters)
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": head.config.vocab_size if head.ids_V is None else len(head.ids_V),
        "target_hidden_size": None,
        LAYER_IDS: layer_ids(head),
        **{switch: getattr(design, switch) for switch in SWITCHES},
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": target or None, "architectures": architectures},
        },
        "tie_word_embeddings": False,
        "transformer_layer_config": {
            "model_type": head.config.model_type,
            **layer_fields(head.config),
            "rope_parameters": rope,
            "tie_word_embeddings": False,
        },
        "dtype": str(head.fc.weight.dtype).removeprefix("torch."),
    }
