"""The target's states at given positions, and what a target is known by.

States come through `target.admit`, as the drafter's do: what a store is built from is what it is asked with. A feature
is `last` (after the final norm) or `layer:k` (before layer k). Stores and indexes are not known here.

Legend: T positions, D hidden.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch

from draftsmith.infer.contract import Target
from draftsmith.infer.row import Row, Stops

SAMPLED_WEIGHTS = 64
# What the weights' shapes do not tell.
CONFIG_KEYS = (
    "model_type", "vocab_size", "num_attention_heads", "num_key_value_heads", "hidden_act", "rope_parameters",
    "rms_norm_eps", "layer_norm_eps", "sliding_window", "final_logit_softcapping", "attn_logit_softcapping",
)  # fmt: skip


def embed(target: Target, sequences: Sequence[Sequence[int]], feature: str, batch_positions: int) -> list[torch.Tensor]:
    """[T - 1, D] per sequence: state i predicted token i + 1. Sequences of like length run together.

    `batch_positions` bounds a pass, padding included; a sequence that is longer runs alone.
    """
    order = sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), i))
    found: dict[int, torch.Tensor] = {}
    while order:
        longest = len(sequences[order[-1]])
        chosen = [order.pop() for _ in range(min(max(batch_positions // longest, 1), len(order)))]
        rows = [Row(str(i), list(sequences[i]), stops=Stops(1)) for i in chosen]
        feedback = target.admit(rows, (feature,))
        target.release(rows)
        for i, given in zip(chosen, feedback):
            found[i] = given.features[feature]
    return [found[i] for i in range(len(sequences))]


def model_of(target: Target) -> Any:
    """The model whose states are read; a target that has none cannot be drafted for by its states."""
    model = getattr(target, "model", None)
    if model is None:
        raise ValueError("dresd reads the target's hidden states, and this target has none to lend")
    return model


def target_fingerprint(target: Target) -> str:
    """Equal for the same weights under the same architecture, in whatever dtype they were loaded (as far as rounding to
    bfloat16 forgets it). Weights are sampled, evenly over every parameter."""
    model = model_of(target)
    config = model.config.get_text_config()
    facts: list[Any] = [[key, getattr(config, key, None)] for key in CONFIG_KEYS]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        where = torch.linspace(0, flat.numel() - 1, min(SAMPLED_WEIGHTS, flat.numel()), dtype=torch.float64)
        sample = flat[where.long().to(flat.device)].to("cpu", torch.float32).to(torch.bfloat16)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
