"""What transformers' `generate` hands to a `custom_generate`: which calls can be drafted for, and the rows they decode.

Whatever would change the text and cannot be honoured raises ValueError.

Legend: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.engine.row_processors import RowProcessors, check_processors

# Made by `generate` itself in every call; the engine has its own cache and asks for the logits that it needs.
OWN = frozenset({"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"})
# What `generate` returns beside the tokens, which a step of several tokens does not have.
OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
WARPED_BY = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def check_call(model: Any, config: Any, model_kwargs: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse a call that cannot be drafted for. `asked`: arguments of `generate` that it keeps to itself."""
    mode = str(config.get_generation_mode(asked.get("assistant_model")).value)
    if mode not in ("greedy_search", "sample"):
        raise ValueError(f"speculative() decodes greedily or samples, and this call asks for {mode.replace('_', ' ')}")
    if config.num_return_sequences not in (None, 1):
        raise ValueError("speculative() does not support num_return_sequences: repeat the prompt in the batch")
    if not model_kwargs.get("use_cache", True):
        raise ValueError("speculative() always uses a cache: leave out use_cache=False")
    if config.cache_implementation == "quantized":
        raise ValueError("speculative() does not support cache_implementation='quantized', which changes the logits")
    if getattr(model_kwargs.get("past_key_values"), "_is_user_defined", False):
        raise ValueError("speculative() has its own cache: leave out past_key_values")
    if asked.get("synced_gpus") or _is_sharded(model):
        raise ValueError("speculative() does not support models that several processes run in step (synced_gpus)")
    if config.return_dict_in_generate:
        for name in OUTPUTS:
            if getattr(config, name, None):
                raise ValueError(f"speculative() does not support {name}: a step gives several tokens at once")
    for name, value in model_kwargs.items():
        if value is not None and name not in OWN:
            raise ValueError(f"speculative() decodes from token ids alone, and this call gives {name}")


def prompts(input_ids_BT: torch.Tensor, model_kwargs: Mapping[str, Any]) -> list[list[int]]:
    """The ids of each row without its left padding."""
    ids: list[list[int]] = input_ids_BT.tolist()
    mask_BT = model_kwargs.get("attention_mask")
    starts = [0] * len(ids)
    if mask_BT is not None:
        if mask_BT.shape != input_ids_BT.shape:
            raise ValueError(f"attention_mask is {list(mask_BT.shape)}, but input_ids is {list(input_ids_BT.shape)}")
        for b, mask in enumerate((mask_BT != 0).tolist()):
            starts[b] = mask.index(True) if True in mask else len(mask)
            if not all(mask[starts[b] :]) or starts[b] == len(mask):
                raise ValueError(
                    f"row {b}: attention_mask may hide padding on the left only: tokenize with padding_side='left'"
                )
    _check_positions(model_kwargs.get("position_ids"), starts, input_ids_BT.shape[1])
    return [row[start:] for row, start in zip(ids, starts)]


def make_rows(
    input_ids_BT: torch.Tensor,
    prompts: Sequence[list[int]],
    processors: Sequence[Any],
    criteria: Sequence[Any],
    config: Any,
    limit: int,
) -> list[Row]:
    """A row per prompt, at most `limit` new tokens each. Stopping is left to `generate`'s own criteria; that a row
    knows its stop tokens only saves it from decoding beyond them."""
    check_processors(processors)
    stop_ids: set[int] = set()
    for one in criteria:
        if hasattr(one, "eos_token_id"):
            stop_ids.update(torch.as_tensor(one.eos_token_id).reshape(-1).tolist())
    settings = _settings(config)
    stops = Stops(limit, frozenset(stop_ids))
    width = input_ids_BT.shape[1]
    rows = []
    for b, prompt in enumerate(prompts):
        padding = input_ids_BT[b, : width - len(prompt)].tolist()
        own = [RowProcessors(processors, b, padding, input_ids_BT.device)] if processors else []
        rows.append(Row(str(b), prompt, settings, stops, processors=own))
    return rows


def new_tokens(criteria: Any, width: int, longest: int, max_positions: int) -> int:
    """How many tokens a row may get; ValueError if the longest prompt and these do not fit into the model."""
    left = max_positions - longest
    limit = left if criteria.max_length is None else max(criteria.max_length - width, 1)
    if limit > left or left < 1:
        raise ValueError(
            f"the prompt has {longest} tokens and {max(limit, 1)} more may follow, but the model has {max_positions} "
            "positions: lower max_new_tokens"
        )
    return int(limit)


def _settings(config: Any) -> Settings:
    """How rows are drafted for; the target's distribution comes from the processors. The seed is drawn from torch's own
    generator, so `torch.manual_seed` decides the text."""
    if not config.do_sample:
        return Settings()
    values = {name: getattr(config, name, None) for name in WARPED_BY}
    given = {name: value for name, value in values.items() if value is not None}
    return Settings(**{"temperature": 1.0, **given}, seed=int(torch.randint(1 << 62, ())))


def _check_positions(position_ids: Any, starts: Sequence[int], width: int) -> None:
    """Positions that a caller gives must be the usual ones: 0, 1, ... from the first token that is not padding."""
    if position_ids is None:
        return
    positions = position_ids.expand(len(starts), -1).tolist() if position_ids.dim() == 2 else []
    for start, given in zip(starts, positions):
        if given[start:] != list(range(width - start)):
            break
    else:
        if positions:
            return
    raise ValueError("speculative() counts positions from each row's first token: leave out position_ids")


def _is_sharded(model: Any) -> bool:
    """Whether several processes each hold a part of the weights (DeepSpeed ZeRO stage 3, FSDP); as `generate` asks."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from transformers.integrations.fsdp import is_fsdp_managed_module

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    split = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
    return bool(split) and torch.distributed.get_world_size() > 1
