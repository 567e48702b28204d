"""Low-rank adapters (peft) on every linear layer of the draft but the head, merged into its weights after training."""

from __future__ import annotations

from typing import Any

import torch


def add_lora(model: Any, rank: int, seed: int) -> None:
    """Freeze `model` and add adapters of `rank` in place."""
    from peft import LoraConfig, inject_adapter_in_model

    names = _linear_maps(model)
    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=names, bias="none")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def _linear_maps(model: Any) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    ]


def has_lora(model: Any) -> bool:
    return any("lora_" in name for name, _ in model.named_parameters())


def merge_lora(model: Any) -> None:
    """Merge the adapters into the weights and remove them: `model` is a plain model again."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            owner = model.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], module.get_base_layer())
