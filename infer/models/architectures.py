"""Which models can verify trees: some families cannot, for a known reason; every other model is probed (probe.py)."""

from __future__ import annotations

from typing import Any

from draftsmith.infer.models.probe import check_neighbours, probed_plan
from draftsmith.infer.models.runner.masks import MaskPlan

ALIBI = {"bloom", "mpt"}
STATE_SPACE = {
    "mamba", "mamba2", "falcon_mamba", "rwkv", "jamba", "bamba", "zamba", "zamba2", "recurrent_gemma", "nemotron_h",
    "granitemoehybrid", "falcon_h1", "lfm2", "lfm2_moe", "qwen3_next", "xlstm", "minimax", "kimi_linear", "plamo2",
}  # fmt: skip
STATEFUL_LAYERS = {"linear_attention", "mamba", "mamba2", "conv", "recurrent", "ssm", "hybrid"}


def refusal(config: Any) -> str | None:
    """Why a model with this config cannot take a tree mask; None if it can."""
    kind = str(getattr(config, "model_type", "unknown"))
    if getattr(config, "is_encoder_decoder", False):
        return f"{kind} is an encoder-decoder model; only decoder-only causal LMs can verify drafts here"
    if kind in ALIBI or getattr(config, "alibi", False):
        return f"{kind} uses ALiBi position biases, which follow cache slots instead of positions: trees come out wrong"
    text = config.get_text_config()
    layer_types = set(getattr(text, "layer_types", None) or ())
    if kind in STATE_SPACE or layer_types & STATEFUL_LAYERS:
        return f"{kind} has state-space or recurrent layers, whose state cannot branch into a tree"
    if "chunked_attention" in layer_types or getattr(text, "attention_chunk_size", None):
        return f"{kind} attends in chunks, which a tree mask cannot express"
    return None


def prepare(model: Any) -> MaskPlan:
    """Check that `model` can verify trees, set an attention that takes masks, and return the masks that it needs."""
    reason = refusal(model.config)
    if reason:
        raise ValueError(reason)
    attention = getattr(model.config, "_attn_implementation", "eager")
    if attention not in ("sdpa", "eager"):
        model.set_attn_implementation("sdpa" if getattr(model, "_supports_sdpa", False) else "eager")
    plan = probed_plan(model)
    check_neighbours(model, plan)
    return plan
