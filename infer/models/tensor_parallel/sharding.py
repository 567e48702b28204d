"""Which models can be split over ranks, and loading one: each rank reads its own share of the weights.

transformers' plan splits the layers; their keys and values are those of a rank's own heads. The input embedding and the
output head stay whole on every rank: drafters borrow them, and logits come out whole without another exchange.

Legend: V vocabulary.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from draftsmith.infer.models.architectures import refusal, state_refusal
from draftsmith.infer.models.hf_target import model_fingerprint
from draftsmith.infer.models.load import DTYPES, loading

HEADS = ("num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's share of a model. `parameters` and `fingerprint` are those of the whole model."""

    model: Any
    parameters: int
    fingerprint: str


def check_sharding(name: str, tp: int, device: str) -> None:
    """Refuse a model, machine or start that cannot give `tp` ranks; reads the config and no weights."""
    from transformers import AutoConfig

    if not dist.is_available() or not dist.is_gloo_available():
        raise ValueError("--tp needs a torch with torch.distributed and gloo, and this one has none")
    _check_start(tp)
    _check_devices(tp, device)
    with loading(name):
        config = AutoConfig.from_pretrained(name)
    reason = sharding_refusal(config, tp)
    if reason:
        raise ValueError(f"{name} cannot be split over {tp} ranks: {reason}")


def _check_start(tp: int) -> None:
    """What torchrun and other launchers set must fit, if anything is set."""
    world = os.environ.get("WORLD_SIZE")
    if world is None:
        return
    if world != str(tp):
        raise ValueError(
            f"--tp {tp}, but WORLD_SIZE is {world}: start as many processes, or unset it to have them started for you"
        )
    missing = [one for one in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(one)]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is set, but not {' and '.join(missing)}: start with torchrun, or unset WORLD_SIZE to have the "
            "ranks started for you"
        )


def _check_devices(tp: int, device: str) -> None:
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--tp {tp} with device {device!r}: the ranks take one device each; say cuda, cpu or nothing")
    if torch.cuda.is_available():
        if device == "cpu":
            raise ValueError(f"--tp {tp} on the CPU of a machine with CUDA devices: hide them (CUDA_VISIBLE_DEVICES=)")
        local = int(os.environ.get("LOCAL_WORLD_SIZE", tp))
        present = torch.cuda.device_count()
        if present < local:
            raise ValueError(f"--tp {tp} needs {local} CUDA devices on this machine; it has {present}")


def sharding_refusal(config: Any, tp: int) -> str | None:
    """Why a model with this config cannot be split over `tp` ranks; None if it can."""
    kind = str(getattr(config, "model_type", "unknown"))
    text = config.get_text_config()
    reason = refusal(config) or state_refusal(config)
    if reason:
        return reason
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantised; give the model that is not"
    for name in HEADS:
        heads = getattr(text, name, None)
        if isinstance(heads, int) and heads % tp:
            what = "fewer than ranks" if heads < tp else f"which {tp} does not divide"
            return f"it has {name}={heads}, {what}"
    model = _empty(config)
    plan = dict(model.tp_plan or {})
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        plan.pop(_name_of(model, module), None)
    if not plan:
        return f"transformers has no tensor-parallel plan for {kind}"
    return _uneven(model, plan, tp)


def _uneven(model: Any, plan: dict[str, str], tp: int) -> str | None:
    """The first layer of the plan whose width the ranks do not divide."""
    from transformers.integrations.tensor_parallel import replace_layer_number_by_wildcard

    for name, module in model.named_modules():
        style = plan.get(replace_layer_number_by_wildcard(name), "")
        width = "in_features" if style.startswith("rowwise") else "out_features" if "colwise" in style else ""
        size = getattr(module, width, 0) if width else 0
        if size % tp:
            return f"the width {size} of {name} does not divide by {tp}"
    return None


def _empty(config: Any) -> Any:
    """The model without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), _quiet():
        return AutoModelForCausalLM.from_config(config)


def _name_of(model: Any, wanted: Any) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "")


def load_shard(name: str, dtype: str) -> Shard:
    """This rank's share of `name`, on its device; all ranks call it."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    with loading(name), _quiet():
        empty = _empty(AutoConfig.from_pretrained(name))
        whole = [_name_of(empty, one) for one in (empty.get_input_embeddings(), empty.get_output_embeddings())]
        plan = dict.fromkeys(filter(None, whole), "replicate")
        split = DistributedConfig(tp_size=dist.get_world_size(), tp_plan=plan)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES.get(dtype, "auto"), distributed_config=split)
    model.eval()
    del model.config.distributed_config  # the config is the model's, however it is split
    parameters = sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        fingerprint = model_fingerprint(model)
        _keep_own(model)
    return Shard(model, parameters, fingerprint)


def _keep_own(model: Any) -> None:
    """Hold the rank's own part of each weight as a plain tensor: passes without gradients use nothing else, and taking
    it out of a distributed one costs time in every layer."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if hasattr(parameter, "to_local"):
                module._parameters[name] = torch.nn.Parameter(parameter.to_local(), requires_grad=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' list of the layers that are whole on all ranks."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
