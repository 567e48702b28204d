"""What a pass of a model multiplies and reads, from its config alone: a model on the meta device is counted."""

from __future__ import annotations

import copy
import re
from collections import Counter
from typing import Any

import torch

from draftsmith.infer.costs.roofline import Work
from draftsmith.infer.measure.plan.shapes import key_heads
from draftsmith.infer.models.layers import head_size, stack_path

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
ACTIVE_COUNTS = ("num_experts_per_tok", "moe_top_k", "moe_k", "experts_per_token")


def work_of(config: Any, dtype: torch.dtype) -> Work:
    """The work of the model with this config."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    text = config.get_text_config()
    layers, matrices, of_experts = int(text.num_hidden_layers), Counter[int](), Counter[int]()
    experts = _count(text, EXPERT_COUNTS)
    for name, parameter in model.get_submodule(stack_path(model)).named_parameters():
        if re.search(r"\bexperts\.", name):
            of_experts[_of_one_expert(name, parameter)] += 1
        elif parameter.dim() >= 2:
            matrices[parameter.numel()] += 1
    del of_experts[0]
    head = model.get_output_embeddings()
    if head is not None:
        matrices[head.weight.numel()] += 1
    if of_experts and not (experts and _count(text, ACTIVE_COUNTS)):
        raise ValueError(f"{config.model_type} has experts, but its config does not say how many a token uses")
    size = head_size(text)
    return Work(
        layers=layers,
        itemsize=dtype.itemsize,
        dtype=str(dtype).removeprefix("torch."),
        matrices=dict(matrices),
        token_bytes=2 * layers * key_heads(text) * size * dtype.itemsize,
        pair_flops=4 * layers * int(text.num_attention_heads) * size,
        expert_matrices=dict(of_experts),
        experts=experts if of_experts else 0,
        active=_count(text, ACTIVE_COUNTS) if of_experts else 0,
    )


def _of_one_expert(name: str, parameter: torch.Tensor) -> int:
    """Weights of one expert's matrix, where `parameter` holds the first one's: families keep all experts of a layer in
    one tensor, or each in its own modules. Biases do not count."""
    if parameter.dim() == 3:
        return parameter[0].numel()
    return parameter.numel() if parameter.dim() == 2 and re.search(r"\bexperts\.0\.", name) else 0


def _count(text: Any, names: tuple[str, ...]) -> int:
    """The first of these entries of the config that it has; 0 for none."""
    return next((int(value) for name in names if (value := getattr(text, name, None))), 0)
