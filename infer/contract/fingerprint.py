"""What a target is known by: whatever is measured or stored for one model must not be used with another.

Weights are sampled, evenly over every parameter, so that a large model is known in a moment. Neither stores nor drafts
are known here.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from draftsmith.infer.contract.protocols import Target

SAMPLED_WEIGHTS = 64
# What the weights' shapes do not tell.
CONFIG_KEYS = (
    "model_type", "vocab_size", "num_attention_heads", "num_key_value_heads", "hidden_act", "rope_parameters",
    "rms_norm_eps", "layer_norm_eps", "sliding_window", "final_logit_softcapping", "attn_logit_softcapping",
)  # fmt: skip


def target_fingerprint(target: Target) -> str:
    """Equal for the same weights under the same architecture, in whatever dtype they were loaded (as far as rounding to
    bfloat16 forgets it)."""
    model = getattr(target, "model", None)
    if model is None:
        raise ValueError("recorded answers do not tell whose they are: what is made for one target needs its model")
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
