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
    (r"^(hidden_size|n_embd|d_model|dim|word_embed_proj_dim|embedding_size|emb_dim|embedding_dim|lru_width)$", 64),
    (r"^(head_dim|global_head_dim|swa_head_dim|kv_channels|v_head_dim|swa_v_head_dim|index_head_dim|rotary_dim)$", 16),
    (r"^(linear_head_dim|linear_key_head_dim|linear_value_head_dim|mamba_chunk_size)$", 16),
    (r"^(state_size|mamba_d_state|ssm_state_size|mamba_dt_rank)$", 16),
    (r"^linear_num_(value_)?heads$", 4),
    (r"^linear_num_key_heads$", 2),
    (r"^qk_(nope|rope)_head_dim$", 16),
    (r"^qk_head_dim$", 32),
    (r"intermediate_size|^(n_inner|ffn_dim|d_ff|ffn_hidden_size|dff|decoder_ffn_dim)$", 64),
    (r"lora_rank|_rank$|^hidden_size_per_layer_input$", 16),
    (r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts)$", 4),
    (r"^(num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|moe_top_k|top_k_experts)$", 2),
    (r"^(n_group|num_expert_group|topk_group)$", 1),
    (r"^first_k_dense_replace$", 1),
)
HEADS = re.compile(r"^(num_attention_heads|n_heads?|num_heads|decoder_attention_heads|swa_num_attention_heads)$")
# Of state-space layers: names of the number of heads, of a head's size, of groups, and of inner over hidden width.
STATE_HEADS = ("mamba_n_heads", "n_mamba_heads", "mamba_num_heads", "num_heads")
STATE_HEAD_SIZES = ("mamba_d_head", "mamba_headdim", "mamba_head_dim", "head_dim")
STATE_GROUPS = ("mamba_n_groups", "mamba_ngroups", "n_groups")
EXPANSIONS = ("mamba_expand", "expand")
LAYER_NUMBERS = re.compile(r"(layer_ids|layers_idx|layer_indices|_idxs)$")
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
    for narrow, each in ((True, 1), (True, 2), (False, 1)):
        try:
            config = tiny_config(model.config, narrow, each)
            return random_model(config, type(model), model.config._attn_implementation)
        except Exception as raised:  # what a family raises at sizes that do not suit it is its own choice
            problem = raised
    raise ValueError(f"a tiny copy of it cannot be built: {type(problem).__name__}: {problem}") from problem


def tiny_config(config: Any, narrow: bool = True, each: int = 1) -> Any:
    """A copy of `config` with small windows and, if `narrow`, small widths, and `each` layers of each kind: layers that
    share their weights come at least in twos."""
    config = _few_layers(config, each)
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
            for name, parameter in model.named_parameters():
                if name.endswith("dt_bias"):  # time steps from below the limits that families set, to above 1
                    parameter.copy_(torch.linspace(-8, 1, parameter.numel()).view(parameter.shape))
                elif parameter.ndim > 1:
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


def _few_layers(config: Any, each: int) -> Any:
    text = config.get_text_config()
    count = int(text.num_hidden_layers)
    lists = [v for v in vars(text).values() if isinstance(v, list) and len(v) == count]
    kinds: dict[str, list[int]] = {}
    for layer in range(count):
        kinds.setdefault(repr([value[layer] for value in lists]), []).append(layer)
    picked = sorted(layer for layers in kinds.values() for layer in layers[:each])
    picked = picked if len(picked) > 1 else list(range(min(count, 2)))
    derived = getattr(text, "layer_types", None) or []
    if len(derived) == count and derived not in lists:  # computed from layer numbers: only a beginning keeps the kinds
        picked = list(range(max(len(picked), 1 + max(derived.index(kind) for kind in set(derived)))))
    last = {repr([value[layer] for value in lists]): layer for layer in range(count)}
    sharers = sorted(layer for layer in last.values() if layer >= count - int(getattr(text, "num_kv_shared_layers", 0)))
    picked = sorted({*picked, *sharers})
    config = picked_config(config, picked)
    text = config.get_text_config()
    for name, value in list(vars(text).items()):
        if LAYER_NUMBERS.search(name) and isinstance(value, list):
            setattr(text, name, [picked.index(layer) for layer in value if layer in picked])
    if sharers:  # the last layers, which use the keys and values of earlier ones
        text.num_kv_shared_layers = len(sharers)
    return config


def _parts(config: Any) -> Iterator[Any]:
    """The config and those nested in it."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            yield from _parts(value)


def _narrow(config: Any) -> None:
    wide = dict(vars(config))
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
    _narrow_states(config, wide)
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict):
        config.rope_parameters = _narrow_rope(copy.deepcopy(rope), vars(config).get("head_dim") or 16)


def _narrow_states(config: Any, wide: dict[str, Any]) -> None:
    """Keep the widths of state-space layers, and of attention beside them, in proportion to the hidden size."""
    hidden = wide.get("hidden_size")
    if not isinstance(hidden, int) or not hidden:
        return
    attention = wide.get("attention_hidden_size")
    if isinstance(attention, int) and not attention % hidden:
        config.attention_hidden_size = attention // hidden * config.hidden_size
        if "attention_head_dim" in wide:
            config.attention_head_dim = config.attention_hidden_size // config.num_attention_heads
    names = [next((n for n in some if isinstance(wide.get(n), int)), "") for some in (STATE_HEADS, STATE_HEAD_SIZES)]
    expansion = next((wide[name] for name in EXPANSIONS if name in wide), 0)
    inner = wide[names[0]] * wide[names[1]] if all(names) else 0
    if inner and inner in (expansion * hidden, wide.get("mamba_d_ssm")):
        size = 16 if inner != expansion * hidden else int(expansion * config.hidden_size) // 4
        setattr(config, names[0], 4)
        setattr(config, names[1], size)
        if "mamba_d_ssm" in wide:
            config.mamba_d_ssm = 4 * size
        for name in STATE_GROUPS:
            if name in wide:
                setattr(config, name, min(wide[name], 2))


def _narrow_rope(rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Factors come one per pair of rotated dimensions."""
    for name, value in rope.items():
        if isinstance(value, dict):
            rope[name] = _narrow_rope(value, head_dim)
        elif name in ("short_factor", "long_factor"):
            rotated = int(head_dim * float(rope.get("partial_rotary_factor") or 1.0))
            rope[name] = value[: rotated // 2]
    return rope
