"""What becomes of every field of transformers' GenerationConfig: honoured, harmless, or refused by name.

A field in none of the lists (of a newer transformers, or a model's own) is refused unless it has its default value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig

# By Settings (the sampling settings) and by HFTarget.stops.
HONOURED = frozenset({
    "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens",
    "min_length", "min_new_tokens", "eos_token_id", "stop_strings",
})  # fmt: skip

_LIMIT = "every answer gets an explicit max_new_tokens, which overrides it in transformers too"
_BEAMS = "read by beam search only, which is refused"
_OUTPUT = "what `generate` returns beside the tokens"
_CACHE = "how keys and values are stored and passes run; the engine has its own cache"
_DRAFTING = "how transformers drafts, which does not change its output"

# Fields that do not change the tokens, and why.
HARMLESS: dict[str, str] = {
    "max_length": _LIMIT,
    "max_new_tokens": _LIMIT,
    "early_stopping": _BEAMS,
    "length_penalty": _BEAMS,
    "diversity_penalty": _BEAMS,
    "low_memory": _BEAMS,
    "output_attentions": _OUTPUT,
    "output_hidden_states": _OUTPUT,
    "output_scores": _OUTPUT,
    "output_logits": _OUTPUT,
    "return_dict_in_generate": _OUTPUT,
    "use_cache": _CACHE,
    "cache_config": _CACHE,
    "max_cache_len": _CACHE,
    "compile_config": _CACHE,
    "disable_compile": _CACHE,
    "continuous_batching_config": _CACHE,
    "prefill_chunk_size": _CACHE,
    "use_mtp": _DRAFTING,
    "num_assistant_tokens": _DRAFTING,
    "num_assistant_tokens_schedule": _DRAFTING,
    "prompt_lookup_num_tokens": _DRAFTING,
    "max_matching_ngram_size": _DRAFTING,
    "assistant_early_exit": _DRAFTING,
    "assistant_lookbehind": _DRAFTING,
    "target_lookbehind": _DRAFTING,
    "speculation_type": _DRAFTING,
    "assistant_confidence_threshold": "read by a draft model only (is_assistant), which is refused as a target",
    "pad_token_id": "rows are not padded with tokens",
    "bos_token_id": "`generate` inserts it into empty prompts only, which are refused",
    "decoder_start_token_id": "read by encoder-decoder models only",
    "renormalize_logits": "log-softmax before the softmax, or before the argmax, changes neither",
    "transformers_version": "says which version wrote the file",
}

# Fields that change the text in ways that a tree cannot follow, with their harmless values.
REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "num_return_sequences": (None, 1),
    "max_time": (None,),
    "top_h": (None,),
    "guidance_scale": (None, 1),
    "watermarking_config": (None,),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "encoder_repetition_penalty": (None, 1),
    "encoder_no_repeat_ngram_size": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "sequence_bias": (None, {}, []),
    "token_healing": (None, False),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "remove_invalid_values": (None, False),
    "is_assistant": (None, False),
    "assistant_ensemble_weight": (None,),
    # All of transformers' caches but the quantised ones, which change the logits.
    "cache_implementation": (
        None, "dynamic", "dynamic_full", "static", "offloaded", "offloaded_static", "offloaded_hybrid",
        "offloaded_hybrid_chunked", "hybrid", "hybrid_chunked", "sliding_window", "paged",
    ),
}  # fmt: skip


def check_fields(config: GenerationConfig) -> None:
    """ValueError for the first field that would change the text and is not honoured."""
    for name, value in vars(config).items():
        if name.startswith("_") or name in HONOURED or name in HARMLESS:
            continue
        shown = " ".join(f"{name}={value!r}".split())
        if name in REFUSED:
            if value not in REFUSED[name]:
                raise ValueError(
                    f"the generation config sets {shown}, which lossless drafting does not support: "
                    "remove it from the model's generation_config.json"
                )
        elif value is not None and value != _default(name):
            raise ValueError(
                f"the generation config sets {shown}, a field that draftsmith does not support: "
                "remove it from the model's generation_config.json if it does not affect decoding"
            )


def _default(name: str) -> Any:
    """What the installed transformers uses for a field that is not set."""
    from transformers import GenerationConfig

    return getattr(GenerationConfig(), name, None)
