"""Which models can verify drafts: trees, or chains where a recurrent state cannot branch.

A few families can do neither, for a known reason; every other model is probed (probe.py, chain_probe.py)."""

from __future__ import annotations

from typing import Any

from draftsmith.infer.models.chain_probe import check_chain, probed_chain_plan
from draftsmith.infer.models.probe import check_neighbours, probed_plan
from draftsmith.infer.models.runner.masks import ChainPlan, MaskPlan

ALIBI = {"bloom", "mpt"}
# What transformers calls layers that carry a state from token to token.
STATEFUL_LAYERS = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}


def refusal(config: Any) -> str | None:
    """Why a model with this config can verify no drafts; None if it may."""
    kind = str(getattr(config, "model_type", "unknown"))
    if getattr(config, "is_encoder_decoder", False):
        return f"{kind} is an encoder-decoder model; only decoder-only causal LMs can verify drafts here"
    if kind in ALIBI or getattr(config, "alibi", False):
        return f"{kind} uses ALiBi position biases, which follow cache slots instead of positions: trees come out wrong"
    text = config.get_text_config()
    if "chunked_attention" in (getattr(text, "layer_types", None) or ()) or getattr(text, "attention_chunk_size", None):
        return f"{kind} attends in chunks, which a tree mask cannot express"
    return None


def state_refusal(config: Any) -> str | None:
    """Why a model with this config cannot take a tree, though it may take a chain; None if nothing says so."""
    if STATEFUL_LAYERS & set(getattr(config.get_text_config(), "layer_types", None) or ()):
        return f"{config.model_type} has state-space or recurrent layers, whose state cannot branch into a tree"
    return None


def prepare(model: Any) -> MaskPlan:
    """Check that `model` can read trees, set an attention that takes masks, and return the masks that it needs."""
    reason = refusal(model.config) or state_refusal(model.config)
    if reason:
        raise ValueError(reason)
    _set_attention(model)
    plan = probed_plan(model)
    check_neighbours(model, plan)
    return plan


def prepare_target(model: Any) -> MaskPlan | ChainPlan:
    """As `prepare`, for a target: if it cannot take trees, check that it can read chains, and return how."""
    reason = refusal(model.config)
    if reason:
        raise ValueError(reason)
    if state_refusal(model.config):
        return _prepare_chain(model)
    try:
        return prepare(model)
    except ValueError as problem:
        try:
            return _prepare_chain(model)
        except ValueError:
            raise problem from None


def _prepare_chain(model: Any) -> ChainPlan:
    _set_attention(model)
    plan = probed_chain_plan(model)
    check_chain(model, plan)
    return plan


def _set_attention(model: Any) -> None:
    attention = getattr(model.config, "_attn_implementation", "eager")
    if attention not in ("sdpa", "eager"):
        model.set_attn_implementation("sdpa" if getattr(model, "_supports_sdpa", False) else "eager")
