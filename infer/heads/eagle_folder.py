"""EAGLE heads in folders: EAGLE's own files (versions 1 and 2 are one format), SpecForge's, SGLang's, speculators'.

One flat format serves both vLLM and SGLang: fields of a LlamaConfig, `midlayer.*` or `layers.0.*`, `fc`, `norm`,
`lm_head`, `d2t` (target id minus draft id) and `t2d` (which target ids are in the draft vocabulary). speculators nests
the LlamaConfig in `transformer_layer_config`. What neither says is refused, or assumed with a warning.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from draftsmith.infer.heads.eagle import EagleDesign, EagleHead, HeadConfig, default_features
from draftsmith.infer.heads.head_files import HeadFiles, fit, uniform
from draftsmith.infer.heads.rotary import KeptRotary

log = logging.getLogger(__name__)

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
SWITCHES = ("norm_before_residual", "norm_output", "norm_before_fc", "fc_norm")
# The base of all rotations in EAGLE's own trainer.
EAGLE_ROPE_THETA = 10_000
# Tensors that are not weights of the module.
MAPS = ("d2t", "t2d")
# What SGLang once called the norms of fc_norm.
OLD_FC_NORMS = ("aux_norm_low", "aux_norm_mid", "aux_norm_high")
OTHER_DESIGNS = {
    "mask_hidden": "a P-EAGLE head, which drafts all its tokens in one pass",
    "mlp.experts": "a head with experts, which are not built here",
    "embed_projection": "a head with an embedding of another width, which is not built here",
}


def read_eagle(files: HeadFiles, target_config: Any | None, dtype: str) -> EagleHead:
    names = {name: _module_name(name) for name in files.shapes if not name.endswith("rotary_emb.inv_freq")}
    shapes = {renamed: files.shapes[name] for name, renamed in names.items()}
    _refuse_others(files.name, shapes)
    config = _layer_config(files, shapes)
    tensors = files.read((name for name, renamed in names.items() if renamed not in MAPS), dtype)
    weights = uniform({names[name]: one for name, one in tensors.items()})
    maps = files.read(name for name, renamed in names.items() if renamed in MAPS)
    ids_V = _draft_ids(files.name, {names[name]: one for name, one in maps.items()}, shapes, config.vocab_size)
    design = _design(files, shapes, config, target_config)
    _warn_of_rotations(files, config, target_config)
    for name in [name for name in weights if name.endswith("self_attn.q_proj.bias")]:
        # Qwen2's layers have no bias here, Llama's with biases do.
        weights.setdefault(name.replace("q_proj", "o_proj"), torch.zeros(config.hidden_size, dtype=weights[name].dtype))
    with torch.device("meta"):
        head = EagleHead(config, design, None, "embed_tokens.weight" in shapes, "lm_head.weight" in shapes)
    head.model.rotary_emb = KeptRotary(LlamaRotaryEmbedding(config))
    if ids_V is not None and head.lm_head is not None:
        head.lm_head = torch.nn.Linear(config.hidden_size, len(ids_V), bias=False, device="meta")
    head.ids_V = ids_V
    fit(head, weights, files.name)
    _check_filled(files.name, weights)
    _check_target(files.name, head, target_config)
    return head


def _module_name(name: str) -> str:
    """The name in EagleHead of a tensor in a folder."""
    name = re.sub(r"^midlayer\.", "layers.0.", name.removeprefix("model."))
    for i, old in enumerate(OLD_FC_NORMS):
        name = re.sub(f"^{old}\\.", f"fc_norm.{i}.", name)
    if name.startswith(("layers.", "norm.")):
        return "model." + name
    return re.sub(r"^fc_norm\.(\d+)\.", r"fc_norms.\1.", name)


def _refuse_others(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    for part, what in OTHER_DESIGNS.items():
        if any(part in key for key in shapes):
            raise ValueError(f"{name} is {what}")
    if "fc.weight" not in shapes or not any(key.startswith("model.layers.0.") for key in shapes):
        raise ValueError(f"{name} is no EAGLE head: it lacks fc.weight or a first layer (midlayer.* or layers.0.*)")


def _layer_config(files: HeadFiles, shapes: dict[str, tuple[int, ...]]) -> HeadConfig:
    """Sizes from the tensors where they show them, the rest from the config."""
    nested = files.config.get("transformer_layer_config")
    fields = dict(nested if isinstance(nested, dict) else files.config)
    if not fields:
        raise ValueError(f"{files.name} has no config.json: how many heads its attention has is unknown")
    fields = {key: value for key, value in fields.items() if key not in ("model_type", "architectures", "auto_map")}
    layers = {int(key.split(".")[2]) for key in shapes if key.startswith("model.layers.")}
    fields["num_hidden_layers"] = len(layers)
    fields["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in shapes
    fields["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in shapes
    fields["hidden_size"] = shapes["fc.weight"][0]
    if "embed_tokens.weight" in shapes:
        fields["vocab_size"] = shapes["embed_tokens.weight"][0]
    # A nested config leaves out what is its class's default.
    missing = [key for key in ("vocab_size", "num_attention_heads") if key not in fields]
    if missing and not isinstance(nested, dict):
        raise ValueError(f"{files.folder / 'config.json'} does not give {' and '.join(missing)}")
    normed = "model.layers.0.self_attn.q_norm.weight" in shapes
    types = fields.pop("layer_types", None) or []
    config = Qwen3Config(**fields) if normed else LlamaConfig(**fields)
    if "sliding_attention" in [*types, *(getattr(config, "layer_types", None) or [])]:
        raise ValueError(f"{files.name} attends within a sliding window, which EAGLE heads here do not")
    return config


def _design(
    files: HeadFiles, shapes: dict[str, tuple[int, ...]], config: HeadConfig, target_config: Any | None
) -> EagleDesign:
    columns, width = shapes["fc.weight"][1], config.hidden_size
    biased = "fc.bias" in shapes
    if "model.layers.0.hidden_norm.weight" not in shapes:
        _check_bias(files, biased)
        return EagleDesign(1, ("last",), columns - width, fc_bias=biased)
    features = _features(files, target_config)
    if columns % len(features):
        raise ValueError(f"{files.name}: fc.weight has {columns} columns, which {len(features)} states do not share")
    found = {
        "norm_before_fc": "input_norm.weight" in shapes,
        "fc_norm": any(key.startswith("fc_norms.") for key in shapes),
    }
    for switch, present in found.items():
        if _said(files.config, switch) not in (None, present):
            state = "without" if not present else "with"
            raise ValueError(f"{files.name}: config.json says {switch} {not present}, and the weights are {state} it")
    return EagleDesign(3, features, columns // len(features), biased, **_switches(files), **found)


def _check_bias(files: HeadFiles, biased: bool) -> None:
    """EAGLE's own loader builds `fc` with a bias unless "bias" is false, and does not notice one that is missing."""
    said = files.config.get("bias")
    if said is not None and bool(said) != biased:
        problem = "there is no fc.bias" if said else "there is an fc.bias"
        raise ValueError(
            f'{files.name}: config.json says "bias": {str(said).lower()}, and {problem}; if the weights are whole, '
            "correct config.json"
        )
    if said is None and not biased:
        log.warning('%s has no fc.bias, and config.json no "bias": taken as a head without one', files.name)


def _switches(files: HeadFiles) -> dict[str, bool]:
    """The switches that leave no tensor behind."""
    nested = "transformer_layer_config" in files.config
    residual, output = _said(files.config, "norm_before_residual"), _said(files.config, "norm_output")
    if residual is None and nested:
        log.warning(
            "%s does not say norm_before_residual: taken as false, speculators' default (vLLM takes it as true)",
            files.name,
        )
    if output and not nested and not files.ours:
        log.warning(
            "%s has norm_output: the normed state is fed back, as engines do; SpecForge trains with the raw one",
            files.name,
        )
    return {"norm_before_residual": bool(residual), "norm_output": bool(output)}


def _warn_of_rotations(files: HeadFiles, config: HeadConfig, target_config: Any | None) -> None:
    """A head's rotations are its own, never the target's; EAGLE's trainer for version 3 does not read their base."""
    if files.ours or "transformer_layer_config" in files.config:
        return
    base = float(config.rope_parameters["rope_theta"])
    given = "rope_theta" in files.config or "rope_parameters" in files.config
    rope = (getattr(target_config.get_text_config(), "rope_parameters", None) or {}) if target_config else {}
    targets = rope.get("rope_theta", base)
    if not given and targets != base:
        log.warning("%s does not say rope_theta: taken as %g, and not as the target's %g", files.name, base, targets)
    if given and base != EAGLE_ROPE_THETA:
        log.warning(
            "%s: rope_theta %g is used, as config.json says; EAGLE's own trainer uses %g whatever that says: if few "
            "tokens are accepted, correct config.json",
            files.name,
            base,
            EAGLE_ROPE_THETA,
        )


def _said(config: dict[str, Any], key: str) -> Any:
    """What a config says at the top level, else in `eagle_config`; None if nothing."""
    nested = config.get("eagle_config")
    found = config.get(key)
    return found if found is not None or not isinstance(nested, dict) else nested.get(key)


def _features(files: HeadFiles, target_config: Any | None) -> tuple[str, ...]:
    """The states that a version 3 head reads, from our own file, from layer ids, or the default ones."""
    own = files.ours.get("features")
    if isinstance(own, list) and own and all(isinstance(one, str) for one in own):
        return tuple(own)
    ids = _said(files.config, LAYER_IDS)
    if ids:
        return _named_layers(files, [int(one) for one in ids])
    if target_config is None:
        raise ValueError(
            f"{files.name} does not say which states it reads, so they depend on the number of its target's layers: "
            "load it together with the target"
        )
    return default_features(int(target_config.get_text_config().num_hidden_layers))


def _named_layers(files: HeadFiles, ids: list[int]) -> tuple[str, ...]:
    """Some count the state before a layer (2, L // 2, L - 3 by default), others the one after it, one less each."""
    if ids[0] == 2:
        after = False
    elif ids[0] == 1:
        after = True
        log.warning("%s: %s %s taken as states after these layers, because the first is 1", files.name, LAYER_IDS, ids)
    elif "speculators_config" in files.config:
        after = False
    else:
        one = ", ".join(f'"layer:{number}"' for number in ids)
        raise ValueError(
            f'{files.name}: are {LAYER_IDS} {ids} states before or after these layers? Write {{"features": [{one}]}} '
            f"(layer:k is the state before layer k) into {files.folder / 'draftsmith.json'}"
        )
    return tuple(f"layer:{number + after}" for number in ids)


def _draft_ids(
    name: str, maps: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]], vocab_size: int
) -> torch.Tensor | None:
    """The target's id of each draft id; None if they are the same."""
    rows = shapes["lm_head.weight"][0] if "lm_head.weight" in shapes else vocab_size
    d2t, t2d = maps.get("d2t"), maps.get("t2d")
    if rows == vocab_size and (d2t is None or not bool(d2t.any())):
        return None
    listed = t2d.bool().nonzero().flatten() if t2d is not None else None
    if d2t is None and listed is None:
        raise ValueError(
            f"{name}: lm_head has {rows} rows of a vocabulary of {vocab_size}, and there is no d2t that says which"
        )
    if d2t is not None and len(d2t) != rows:
        raise ValueError(f"{name}: d2t has {len(d2t)} entries, and lm_head {rows} rows")
    ids = torch.arange(rows) + d2t.long() if d2t is not None else listed
    assert ids is not None
    if listed is not None and (len(listed) != rows or not torch.equal(ids, listed)):
        raise ValueError(f"{name}: d2t and t2d name different tokens; one of them was not filled in")
    if len(ids) != len(ids.unique()) or int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise ValueError(f"{name}: d2t does not map its {rows} draft ids to as many tokens below {vocab_size}")
    if d2t is not None and listed is None and not bool(d2t.any()):
        log.warning("%s: d2t is all zeros, taken as the target's first %d tokens", name, rows)
    return ids


def _check_filled(name: str, weights: dict[str, torch.Tensor]) -> None:
    """speculators marks an embedding and a head that were never loaded by NaN."""
    for key in ("embed_tokens.weight", "lm_head.weight"):
        if key in weights and bool(weights[key].flatten()[:1].isnan()):
            raise ValueError(f"{name}: {key} is NaN: the target's weights were never copied into it")


def _check_target(name: str, head: EagleHead, target_config: Any | None) -> None:
    if target_config is None:
        return
    text = target_config.get_text_config()
    if head.design.feature_width != text.hidden_size:
        raise ValueError(
            f"{name} reads states of width {head.design.feature_width}, and the target's are {text.hidden_size} wide: "
            "it is the head of another target"
        )
    last = max((int(one.partition(":")[2]) for one in head.features if one.startswith("layer:")), default=0)
    if last > text.num_hidden_layers:
        raise ValueError(f"{name} reads layer:{last}, and the target has {text.num_hidden_layers} layers")
    if head.ids_V is not None and int(head.ids_V.max()) >= text.vocab_size:
        raise ValueError(f"{name} drafts token {int(head.ids_V.max())}, and the target has {text.vocab_size} tokens")
