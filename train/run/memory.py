"""An estimate of a run's memory before it starts: weights, gradients, optimiser, activations, loss.

Allocator, framework and data are not included.

Legend: T positions of a micro-batch, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from draftsmith.train.objectives.chunked_loss import CHUNK_ENTRIES, CHUNK_ENTRIES_CUDA

# Tensors of T x D that a layer keeps for its backward pass, measured on Llama shapes; no attention matrix is kept.
KEPT_PER_LAYER = 16


def memory_estimate(
    model: Any,
    *,
    positions: int,
    num_exits: int,
    optimiser: str,
    width: int,
    checkpointing: bool,
    shards: dict[str, int],
    cuda: bool,
) -> dict[str, float]:
    """GiB by part, on one device. `width`: bytes of an activation; `shards`: devices that share each part."""
    config = model.config.get_text_config()
    total = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    trained = sum(weight.numel() * weight.element_size() for weight in model.parameters() if weight.requires_grad)
    state = sum(
        weight.numel() * weight.element_size() * (1 if optimiser == "muon" and weight.ndim == 2 else 2)
        for weight in model.parameters()
        if weight.requires_grad
    )
    ratio = (getattr(config, "intermediate_size", None) or 4 * config.hidden_size) / config.hidden_size
    kept = 1 if checkpointing else KEPT_PER_LAYER + 3 * ratio
    activations = positions * config.hidden_size * width * kept * config.num_hidden_layers
    loss = config.vocab_size * config.hidden_size * 4 + positions * config.hidden_size * width * 2 * num_exits
    loss += (CHUNK_ENTRIES_CUDA if cuda else CHUNK_ENTRIES) * 4 * 2
    parts = {
        "weights": total / shards.get("weights", 1),
        "gradients": trained / shards.get("gradients", 1),
        "optimiser": state / shards.get("optimiser", 1),
        "activations": activations,
        "loss": loss,
    }
    parts["total"] = sum(parts.values())
    return {name: round(size / 2**30, 3) for name, size in parts.items()}


def shards_of(strategy: str, devices: int) -> dict[str, int]:
    """The parts that a strategy shards, with the number of devices."""
    parts = {"fsdp": 3, "deepspeed_stage_3": 3, "deepspeed_stage_2": 2}.get(strategy, 0)
    return dict.fromkeys(("optimiser", "gradients", "weights")[:parts], devices)
