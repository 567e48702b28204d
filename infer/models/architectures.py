"""Which model families take a tree mask, which cannot, and which masks each needs.

A family on neither list is probed once at load: a small float32 twin runs a five-node tree through the cache, and the
logits of every node must equal those of its path run on its own.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from draftsmith.infer.models.cached_lm import CachedLM, Entries
from draftsmith.infer.models.masks import MaskPlan

KNOWN = {
    "llama", "mistral", "gemma2", "gemma3_text", "qwen2", "qwen3", "phi3", "mixtral", "gpt_neox", "gpt2", "opt",
}  # fmt: skip
ALIBI = {"bloom", "mpt"}
STATE_SPACE = {
    "mamba", "mamba2", "falcon_mamba", "rwkv", "jamba", "bamba", "zamba", "zamba2", "recurrent_gemma", "nemotron_h",
    "granitemoehybrid", "falcon_h1", "lfm2", "lfm2_moe", "qwen3_next", "xlstm", "minimax", "kimi_linear", "plamo2",
}  # fmt: skip
# Families that take one mask for all layers, not a dict of masks.
ONE_MASK = {"llama", "mistral", "phi3", "mixtral", "gpt_neox", "gpt2", "opt"}
STATEFUL_LAYERS = {"linear_attention", "mamba", "mamba2", "conv", "recurrent", "ssm", "hybrid"}
TOLERANCE = 1e-3


def refusal(config: Any) -> str | None:
    """Why a model with this config cannot take a tree mask; None if it can."""
    kind = str(getattr(config, "model_type", "unknown"))
    if getattr(config, "is_encoder_decoder", False):
        return f"{kind} is an encoder-decoder model; only decoder-only causal LMs can verify drafts here"
    if kind in ALIBI or getattr(config, "alibi", False):
        return f"{kind} uses ALiBi position biases, which follow cache slots instead of positions: trees come out wrong"
    layer_types = set(getattr(config, "layer_types", None) or ())
    if kind in STATE_SPACE or layer_types & STATEFUL_LAYERS:
        return f"{kind} has state-space or recurrent layers, whose state cannot branch into a tree"
    if "chunked_attention" in layer_types or getattr(config, "attention_chunk_size", None):
        return f"{kind} attends in chunks, which a tree mask cannot express"
    return None


def mask_plan(config: Any) -> MaskPlan:
    """The masks that this config's layers need."""
    window = getattr(config, "sliding_window", None)
    layer_types = list(getattr(config, "layer_types", None) or ())
    if layer_types:
        kinds = dict.fromkeys(layer_types)
        windows = {kind: window if "sliding" in kind else None for kind in kinds}
        return MaskPlan(windows, by_kind=getattr(config, "model_type", "") not in ONE_MASK)
    if window is not None and getattr(config, "use_sliding_window", True):
        return MaskPlan({"sliding_attention": int(window)})
    return MaskPlan()


def max_positions(config: Any) -> int:
    """The number of positions that the model takes.

    If the rotary embedding depends on the length of the call, only up to where it begins to: beyond that, a token's
    distribution depends on how the text was cut into calls, and decoding could not be lossless."""
    names = ("max_position_embeddings", "n_positions")
    limit = next((int(getattr(config, name)) for name in names if getattr(config, name, 0)), 1 << 20)
    rope = getattr(config, "rope_parameters", None) or {}
    for part in rope.values() if rope and all(isinstance(v, dict) for v in rope.values()) else [rope]:
        if part.get("rope_type") in ("longrope", "dynamic"):
            limit = min(limit, int(part.get("original_max_position_embeddings") or limit))
    return limit


def prepare(model: Any) -> MaskPlan:
    """Check that `model` can verify trees, set an attention that takes masks, and return the masks that it needs."""
    reason = refusal(model.config)
    if reason:
        raise ValueError(reason)
    attention = getattr(model.config, "_attn_implementation", "eager")
    if attention not in ("sdpa", "eager"):
        model.set_attn_implementation("sdpa" if getattr(model, "_supports_sdpa", False) else "eager")
    plan = mask_plan(model.config)
    if model.config.model_type not in KNOWN:
        probe(model)
    return plan


def probe(model: Any) -> None:
    """Refuse a model whose small float32 twin gives other logits for a tree than for its paths one by one."""
    kind = model.config.model_type
    try:
        twin = _twin(model)
        error = tree_error(twin, mask_plan(twin.config))
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, KeyError, AssertionError) as problem:
        raise ValueError(f"{kind} is not a known family, and its tree mask probe failed: {problem}") from problem
    if not error < TOLERANCE:
        raise ValueError(
            f"{kind} is not a known family, and it does not honour a tree mask: logits of a five-node tree differ from "
            f"those of its paths by {error:.2g} of their standard deviation"
        )


@torch.inference_mode()
def tree_error(model: Any, plan: MaskPlan) -> float:
    """The largest difference between a tree's logits and those of its paths, over the logits' standard deviation."""
    vocab = int(model.config.get_text_config().vocab_size)
    prompt = [(7 * i + 3) % vocab for i in range(24)]
    tokens, parents = [5 % vocab, 11 % vocab, 2 % vocab, 9 % vocab, 4 % vocab], [-1, -1, 0, 1, 2]
    lm = CachedLM(model, plan)
    lm.open("probe", len(prompt) + 8)
    lm.prefill(["probe"], [prompt[:-1]])
    lm.forward(["probe"], [Entries([prompt[-1]], [-1])])
    logits_BQV, _ = lm.forward(["probe"], [Entries(tokens, [0 if parent < 0 else parent + 1 for parent in parents])])
    worst = 0.0
    for node in range(len(tokens)):
        path, at = [], node
        while at >= 0:
            path.append(tokens[at])
            at = parents[at]
        alone_V = model(torch.tensor([prompt + path[::-1]], device=lm.device), use_cache=False).logits[0, -1]
        worst = max(worst, float((logits_BQV[0, node] - alone_V).abs().max() / alone_V.std()))
    return worst


def _twin(model: Any) -> Any:
    """A random float32 model of the same class and config, with few layers and a short window."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    layer_types = list(getattr(text, "layer_types", None) or ())
    layers = min(text.num_hidden_layers, 2)
    if layer_types:
        layers = max(layers, 1 + max(layer_types.index(kind) for kind in set(layer_types)))
        text.layer_types = layer_types[:layers]
    text.num_hidden_layers = layers
    if getattr(text, "sliding_window", None):
        text.sliding_window = 8
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        twin = type(model)(config)
    twin.set_attn_implementation(model.config._attn_implementation)
    return twin.to(dtype=torch.float32, device="cpu").eval()
