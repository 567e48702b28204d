"""Folders of drafts with one fault each, made from a healthy one. Not tests: what tests share."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from draftsmith.infer.measure.doctor.exam import Exam
from draftsmith.infer.measure.doctor.finding import Finding
from draftsmith.infer.measure.doctor.questions import built_in
from draftsmith.infer.models.load import load_target
from draftsmith.infer.text.templates import find_template

Tensors = dict[str, torch.Tensor]
WIDTH_OF_HEADS = 8
PROMPTS, TOKENS = 8, 20


def ill(
    healthy: str | Path,
    place: Path,
    weights: Callable[[Tensors], None] | None = None,
    files: dict[str, Callable[[dict[str, Any]], None]] | None = None,
    weights_file: str = "model.safetensors",
) -> str:
    """A copy of a folder, with its weights and JSON files changed in place."""
    shutil.copytree(healthy, place)
    if weights is not None:
        tensors = load_file(place / weights_file)
        weights(tensors)
        whole = {name: one.contiguous() for name, one in tensors.items()}
        save_file(whole, place / weights_file, {"format": "pt"})
    for name, change in (files or {}).items():
        path = place / name
        held = json.loads(path.read_text())
        change(held)
        path.write_text(json.dumps(held))
    return str(place)


def verdicts(findings: list[Finding]) -> dict[str, str]:
    return {one.check: one.verdict for one in findings}


def wrong(findings: list[Finding]) -> set[str]:
    return {one.check for one in findings if one.verdict == "wrong"}


def random_embedding(tensors: Tensors) -> None:
    held = tensors["model.embed_tokens.weight"]
    generator = torch.Generator().manual_seed(3)
    tensors["model.embed_tokens.weight"] = torch.randn(held.shape, generator=generator).to(held) * held.std()


def permuted_rotary(tensors: Tensors) -> None:
    """Queries and keys with neighbours to rotate, as Meta's own checkpoints store them."""
    for name, one in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            by_head = one.unflatten(0, (-1, 2, WIDTH_OF_HEADS // 2))
            tensors[name] = by_head.transpose(1, 2).flatten(0, 2).clone()


def shifted_ids(tensors: Tensors) -> None:
    """As if one token had been inserted before all others."""
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name].roll(1, 0)


def overflowing(tensors: Tensors, prefix: str = "model.layers.0.mlp.") -> None:
    """The same function in float32; in float16 the product within the first layer's MLP overflows."""
    tensors[f"{prefix}up_proj.weight"] = tensors[f"{prefix}up_proj.weight"] * 2.0**15
    tensors[f"{prefix}down_proj.weight"] = tensors[f"{prefix}down_proj.weight"] / 2.0**15


def overflowing_head(tensors: Tensors) -> None:
    """The same of an EAGLE head."""
    overflowing(
        tensors, next(name for name in tensors if name.endswith("mlp.up_proj.weight")).removesuffix("up_proj.weight")
    )


@torch.no_grad()
def deepened(model: Any, layers: int) -> Any:
    """`model` with layers added that change nothing: after its own layers it predicts what it did before."""
    other = copy.deepcopy(model)
    own = len(other.model.layers)
    for at in range(own, layers):
        layer = copy.deepcopy(other.model.layers[at % own])
        layer.self_attn.layer_idx = at
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        other.model.layers.append(layer)
    other.config.num_hidden_layers = layers
    if getattr(other.config, "layer_types", None):
        other.config.layer_types = ["full_attention"] * layers
    return other


def shifted_tokenizer(held: dict[str, Any]) -> None:
    """tokenizer.json with a token inserted before all others."""
    held["model"]["vocab"] = {"<inserted>": 0} | {token: at + 1 for token, at in held["model"]["vocab"].items()}
    for token in held["added_tokens"]:
        token["id"] += 1


def theta(base: float) -> Callable[[dict[str, Any]], None]:
    return lambda held: held["rope_parameters"].update(rope_theta=base)


def entries(**changed: Any) -> Callable[[dict[str, Any]], None]:
    return lambda held: held.update(changed)


def layers_moved(step: int) -> Callable[[dict[str, Any]], None]:
    """The states that an EAGLE head reads, some layers off."""

    def move(held: dict[str, Any]) -> None:
        held["features"] = [f"layer:{int(name.partition(':')[2]) + step}" for name in held["features"]]

    return move


def without_d2t(tensors: Tensors) -> None:
    del tensors["d2t"], tensors["t2d"]


def zero_d2t(tensors: Tensors) -> None:
    del tensors["t2d"]
    tensors["d2t"] = tensors["d2t"] * 0


def shifted_d2t(tensors: Tensors) -> None:
    """Each draft id one token too high."""
    del tensors["t2d"]
    tensors["d2t"] = tensors["d2t"] + 1


def absolute_d2t(tensors: Tensors) -> None:
    """The target's ids, where their differences from the draft's belong. No id comes twice."""
    del tensors["t2d"]
    tensors["d2t"] = tensors["d2t"] + torch.arange(len(tensors["d2t"]))


def sit(folder: str, prompts: int = PROMPTS, tokens: int = TOKENS, dtype: str = "auto") -> Exam:
    with contextlib.redirect_stderr(io.StringIO()):
        target = load_target(folder, dtype=dtype, device="cpu")
    assert target.tokenizer is not None
    return Exam.sit(target, folder, find_template("chat", target.tokenizer), built_in()[:prompts], tokens)
