"""A tiny random model of the same class and options as another, to try out what the family does.

Widths, heads, experts and vocabulary shrink, so does every window or chunk; one layer of each kind stays. The weights
are wide enough that every token a query sees changes its logits.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch

from draftsmith.infer.models.layers import picked_config
from draftsmith.infer.models.positions import max_positions

VOCAB = 96
# Attributes that limit how far, or to how many tokens, a layer attends.
WINDOW = re.compile(r"window|chunk|sliding|local|keep|topk|block_size|radius|compress_ratio")
NOT_A_WINDOW = re.compile(r"expert|pattern|layer|feed_forward|mamba|logits|^num_|_num_|group|moe|router|theta|prob")
SHRUNK_WINDOW = 8
# Widths by name. The first pattern that matches decides.
WIDTHS = (
    (r"^vocab_size", VOCAB),
    (r"^(hidden_size|n_embd|d_model|dim|word_embed_proj_dim|embedding_size|emb_dim)$", 64),
    (r"^(head_dim|global_head_dim|swa_head_dim|kv_channels|v_head_dim|swa_v_head_dim|index_head_dim|rotary_dim)$", 16),
    (r"^qk_(nope|rope)_head_dim$", 16),
    (r"^qk_head_dim$", 32),
    (r"intermediate_size|^(n_inner|ffn_dim|d_ff|ffn_hidden_size|dff|decoder_ffn_dim)$", 64),
    (r"lora_rank|_rank$|^hidden_size_per_layer_input$", 16),
    (r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts)$", 4),
    (r"^(num_experts_per_tok|moe_topk|moe_k|moe_top_k|top_k_experts)$", 2),
    (r"^(n_group|topk_group)$", 1),
    (r"^first_k_dense_replace$", 1),
)
HEADS = re.compile(r"^(num_attention_heads|n_heads?|num_heads|decoder_attention_heads|swa_num_attention_heads)$")
GROUPS = re.compile(r"(num_key_value_heads|num_kv_heads|n_head_kv|kv_n_heads|num_global_key_value_heads)$")


def window_attributes(config: Any) -> dict[str, int]:
    """The config's windows, chunks and the like, by name."""
    found: dict[str, int] = {}
    for name, value in vars(config).items():
        is_size = isinstance(value, int) and not isinstance(value, bool) and value > 1
        if is_size and WINDOW.search(name) and not NOT_A_WINDOW.search(name):
            found[name] = value
    return found


def tiny_twin(model: Any) -> Any:
    """A random float32 twin of `model` on the CPU; as wide as the model if the family cannot be made narrow."""
    problem: Exception = AssertionError()
    for narrow in (True, False):
        try:
            return random_model(tiny_config(model.config, narrow), type(model), model.config._attn_implementation)
        except Exception as raised:  # what a family raises at sizes that do not suit it is its own choice
            problem = raised
    raise ValueError(f"a tiny copy of it cannot be built: {type(problem).__name__}: {problem}") from problem


def tiny_config(config: Any, narrow: bool = True) -> Any:
    """A copy of `config` with one layer of each kind, small windows and, if `narrow`, small widths."""
    config = _few_layers(config)
    text = config.get_text_config()
    sizes = sorted(set(window_attributes(text).values()))
    for name, value in window_attributes(text).items():
        setattr(text, name, min(value, SHRUNK_WINDOW + sizes.index(value)))
    for part in _parts(config) if narrow else ():
        _narrow(part)
    for part in _parts(config):
        for name in vars(part):
            if name.endswith("_token_id") and getattr(part, name) is not None:
                setattr(part, name, _small_ids(getattr(part, name)))
        part.use_cache = True
    return config


def random_model(config: Any, kind: type, attention: str | None = None) -> Any:
    """A model of class `kind` with wide random weights, which runs."""
    from transformers import AutoModelForCausalLM, PreTrainedModel

    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.inference_mode(False):
        torch.manual_seed(0)
        model = kind(config) if issubclass(kind, PreTrainedModel) else AutoModelForCausalLM.from_config(config)
        model = model.to(dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
                elif parameter.is_floating_point():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    if attention is not None:
        model.set_attn_implementation(attention)
    with torch.inference_mode():
        vocab, length = int(config.get_text_config().vocab_size), min(10, max_positions(config))
        model(torch.arange(2, 2 + length)[None] % vocab, use_cache=False)
    return model


def _small_ids(value: Any) -> Any:
    return [_small_ids(one) for one in value] if isinstance(value, list) else min(int(value), VOCAB - 1)


def _few_layers(config: Any) -> Any:
    text = config.get_text_config()
    count = int(text.num_hidden_layers)
    lists = [v for v in vars(text).values() if isinstance(v, list) and len(v) == count]
    kinds: dict[str, int] = {}
    for layer in range(count):
        kinds.setdefault(repr([value[layer] for value in lists]), layer)
    picked = sorted(kinds.values())
    picked = picked if len(picked) > 1 else list(range(min(count, 2)))
    last = {repr([value[layer] for value in lists]): layer for layer in range(count)}
    sharers = sorted(layer for layer in last.values() if layer >= count - int(getattr(text, "num_kv_shared_layers", 0)))
    config = picked_config(config, sorted({*picked, *sharers}))
    if sharers:  # the last layers, which use the keys and values of earlier ones
        config.get_text_config().num_kv_shared_layers = len(sharers)
    return config


def _parts(config: Any) -> Iterator[Any]:
    """The config and those nested in it."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            yield from _parts(value)


def _narrow(config: Any) -> None:
    heads = next((value for name, value in vars(config).items() if HEADS.match(name)), None)
    for name, value in list(vars(config).items()):
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        size = next((size for pattern, size in WIDTHS if re.search(pattern, name)), None)
        if size is not None:
            setattr(config, name, min(value, size))
        elif HEADS.match(name):
            setattr(config, name, min(value, 4))
        elif GROUPS.search(name):
            setattr(config, name, 4 if value == heads else min(value, 2))
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict):
        config.rope_parameters = _narrow_rope(copy.deepcopy(rope), vars(config).get("head_dim") or 16)


def _narrow_rope(rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Factors come one per pair of rotated dimensions."""
    for name, value in rope.items():
        if isinstance(value, dict):
            rope[name] = _narrow_rope(value, head_dim)
        elif name in ("short_factor", "long_factor"):
            rotated = int(head_dim * float(rope.get("partial_rotary_factor") or 1.0))
            rope[name] = value[: rotated // 2]
    return rope
