"""Every field of the installed transformers' GenerationConfig: honoured, harmless or refused, none forgotten.

A field counts as honoured only if it changes the text, and the tokens that a drafted tree gives, greedy or sampled,
equal those of `model.generate` with the same config and the same uniforms.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import plant
from transformers import AutoTokenizer, CompileConfig, GenerationConfig, WatermarkingConfig
from transformers.generation import ContinuousBatchingConfig

from draftsmith.infer.contract.generation_fields import HARMLESS, HONOURED, REFUSED
from draftsmith.infer.contract.race import first
from draftsmith.infer.contract.row import Row
from draftsmith.infer.contract.sampling import Settings, resolve_settings
from draftsmith.infer.drafters import SmallLM
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.models.hf_target import HFTarget

PROMPT = [5, 9, 31, 17, 9, 31, 40]
NEW = 24
SEED = 4
SAMPLING = {"do_sample": True, "temperature": 1.3, "top_k": 0}
# Per honoured field: what else the config sets, and its value. The names in the values are explained by `filled`.
HONOURED_VALUES: dict[str, tuple[dict[str, Any], Any]] = {
    "do_sample": ({}, True),
    "temperature": (SAMPLING, 0.6),
    "top_k": (SAMPLING, 3),
    "top_p": (SAMPLING, 0.6),
    "min_p": (SAMPLING, 0.3),
    "typical_p": (SAMPLING, 0.3),
    "epsilon_cutoff": (SAMPLING, 0.05),
    "eta_cutoff": (SAMPLING, 0.6),
    "repetition_penalty": ({}, 1.8),
    "no_repeat_ngram_size": ({}, 2),
    "bad_words_ids": ({}, [["token:1"], ["token:4", "token:5"]]),
    "suppress_tokens": ({}, ["token:3"]),
    "begin_suppress_tokens": ({}, ["token:0"]),
    "min_length": ({"eos_token_id": "often"}, "length"),
    "min_new_tokens": ({"eos_token_id": "often"}, "new"),
    "eos_token_id": ({}, ["eos", 60]),
    "stop_strings": ({}, ["text", "never there"]),
}
HARMLESS_VALUES: dict[str, Any] = {
    "max_length": 9, "max_new_tokens": 3, "early_stopping": True, "length_penalty": 2.0, "diversity_penalty": 0.5,
    "low_memory": True, "output_attentions": True, "output_hidden_states": True, "output_scores": True,
    "output_logits": True, "return_dict_in_generate": True, "use_cache": False, "cache_config": {"nbits": 4},
    "max_cache_len": 64, "compile_config": CompileConfig(), "disable_compile": True,
    "continuous_batching_config": ContinuousBatchingConfig(), "prefill_chunk_size": 3, "use_mtp": True,
    "num_assistant_tokens": 3, "num_assistant_tokens_schedule": "heuristic", "prompt_lookup_num_tokens": 3,
    "max_matching_ngram_size": 3, "assistant_early_exit": 1, "assistant_lookbehind": 5, "target_lookbehind": 5,
    "speculation_type": "dflash", "assistant_confidence_threshold": 0.9, "pad_token_id": 7, "bos_token_id": 8,
    "decoder_start_token_id": 9, "renormalize_logits": True, "transformers_version": "4.1",
}  # fmt: skip
# `generate` cannot decode this model with these: MTP heads, exits and DFlash drafts that it lacks.
NOT_RUN = {"use_mtp", "assistant_early_exit", "speculation_type"}
REFUSED_VALUES: dict[str, Any] = {
    "num_beams": 3, "num_beam_groups": 2, "num_return_sequences": 2, "max_time": 0.5, "top_h": 0.4,
    "guidance_scale": 1.5, "watermarking_config": WatermarkingConfig(), "penalty_alpha": 0.6, "dola_layers": "low",
    "constraints": ["x"], "force_words_ids": [[3]], "encoder_repetition_penalty": 1.2,
    "encoder_no_repeat_ngram_size": 3, "exponential_decay_length_penalty": (3, 1.1), "sequence_bias": [[[4], 2.0]],
    "token_healing": True, "forced_bos_token_id": 3, "forced_eos_token_id": 4, "remove_invalid_values": True,
    "is_assistant": True, "assistant_ensemble_weight": 0.5, "cache_implementation": "quantized",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(make_model: Any) -> Any:
    model = make_model("llama", torch.float32)
    model.generation_config = GenerationConfig()
    return model


@pytest.fixture(scope="module")
def draft(model: Any, shake: Any) -> Any:
    return shake(model, 0.05)


@pytest.fixture(scope="module")
def tokenizer(word_tokenizer: Path) -> Any:
    """The model's 61 tokens are letters of their own, and none of them ends an answer."""
    return AutoTokenizer.from_pretrained(word_tokenizer, eos_token=None)


def config_of(**fields: Any) -> GenerationConfig:
    config = GenerationConfig()
    for name, value in fields.items():  # set one by one: the constructor refuses some of them, old files hold them
        setattr(config, name, value)
    return config


def ours(model: Any, draft: Any, tokenizer: Any, config: GenerationConfig) -> list[int]:
    target = HFTarget(model, tokenizer)
    drafter = SmallLM(draft, num_draft_tokens=5, top_k=3, min_confidence=0.0, sample="coupled")
    before, model.generation_config = model.generation_config, config
    try:
        settings, stops = resolve_settings(config, seed=SEED), target.stops(NEW)
    finally:
        model.generation_config = before
    drafter.bind(target)
    return generate(target, drafter, [Row("0", PROMPT, settings, stops, tokenizer)])[0].token_ids


def theirs(model: Any, tokenizer: Any, config: GenerationConfig, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """transformers' own tokens, its draws by the races of the row's positions."""
    made = iter(range(len(PROMPT), len(PROMPT) + NEW))

    def draw(probs_1V: torch.Tensor, num_samples: int) -> torch.Tensor:
        return torch.tensor([[first(probs_1V[0].double().log(), SEED, "0", next(made))]])

    monkeypatch.setattr(torch, "multinomial", draw)
    ids_1T = torch.tensor([PROMPT])
    out = model.generate(
        ids_1T, attention_mask=torch.ones_like(ids_1T), generation_config=config, max_new_tokens=NEW,
        tokenizer=tokenizer,
    )  # fmt: skip
    sequences = out if isinstance(out, torch.Tensor) else out.sequences
    return sequences[0, len(PROMPT) :].tolist()


@pytest.fixture(scope="module")
def plain(model: Any, draft: Any, tokenizer: Any) -> list[int]:
    return ours(model, draft, tokenizer, config_of())


def filled(value: Any, plain: list[int], tokenizer: Any) -> Any:
    """`value` with the names of HONOURED_VALUES replaced."""
    if isinstance(value, list):
        return [filled(one, plain, tokenizer) for one in value]
    index = next(i for i in range(4, NEW) if plain[i] not in plain[:i])
    if value == "eos":
        return plain[index]
    if value == "often":  # every token but one, so that the answer ends as soon as the minimum lets it
        return [token for token in range(61) if token != 20]
    if value == "length":
        return len(PROMPT) + index + 1
    if value == "new":
        return index + 1
    if value == "text":
        return tokenizer.decode(plain[index - 2 : index + 1])
    return plain[int(value[6:])] if isinstance(value, str) and value.startswith("token:") else value


def test_every_field_is_honoured_harmless_or_refused() -> None:
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert HONOURED == HONOURED_VALUES.keys()
    assert HARMLESS.keys() == HARMLESS_VALUES.keys()
    assert REFUSED.keys() == REFUSED_VALUES.keys()
    assert not HONOURED & HARMLESS.keys()
    assert not REFUSED.keys() & (HONOURED | HARMLESS.keys())
    assert fields == HONOURED | HARMLESS.keys() | REFUSED.keys(), "decide what becomes of the new fields"


@pytest.mark.parametrize("name", sorted(HONOURED))
def test_an_honoured_field_gives_the_tokens_of_generate(
    name: str, model: Any, draft: Any, tokenizer: Any, plain: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_honoured(name, model, draft, tokenizer, plain, monkeypatch)


@pytest.mark.parametrize(
    ("name", "sound", "fault"),
    [
        ("min_new_tokens", "prompt_tokens, self.min_new_tokens, eos", "prompt_tokens, self.min_new_tokens - 1, eos"),
        ("min_new_tokens", "prompt_tokens, self.min_new_tokens, eos", "prompt_tokens, self.min_new_tokens + 1, eos"),
        ("min_length", "LogitsProcessor(self.min_length, eos)", "LogitsProcessor(self.min_length - 1, eos)"),
        ("min_length", "LogitsProcessor(self.min_length, eos)", "LogitsProcessor(self.min_length + 1, eos)"),
        ("begin_suppress_tokens", "suppress_tokens), prompt_tokens, dev", "suppress_tokens), prompt_tokens + 1, dev"),
        ("begin_suppress_tokens", "suppress_tokens), prompt_tokens, dev", "suppress_tokens), prompt_tokens - 1, dev"),
    ],
)
def test_planted_minimum_or_begin_index_off_by_one_is_caught(
    name: str, sound: str, fault: str,
    model: Any, draft: Any, tokenizer: Any, plain: list[int], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plant(monkeypatch, Settings, "processors", sound, fault)
    with pytest.raises(AssertionError):
        check_honoured(name, model, draft, tokenizer, plain, monkeypatch)


def check_honoured(
    name: str, model: Any, draft: Any, tokenizer: Any, plain: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    others, value = HONOURED_VALUES[name]
    base = {other: filled(one, plain, tokenizer) for other, one in others.items()}
    without = {} if name == "do_sample" else base
    fields = base | {name: filled(value, plain, tokenizer)} | ({"top_k": 0} if name == "do_sample" else {})
    got = ours(model, draft, tokenizer, config_of(**fields))
    assert got == theirs(model, tokenizer, config_of(**fields, pad_token_id=0), monkeypatch)
    assert got != ours(model, draft, tokenizer, config_of(**without)), "this value changes nothing"


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_a_harmless_field_changes_neither_our_tokens_nor_those_of_generate(
    name: str, model: Any, draft: Any, tokenizer: Any, plain: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {name: HARMLESS_VALUES[name]}
    assert ours(model, draft, tokenizer, config_of(**fields)) == plain
    if name not in NOT_RUN:
        assert theirs(model, tokenizer, config_of(**{"pad_token_id": 0} | fields), monkeypatch) == plain


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_field_that_cannot_be_honoured_is_refused_by_name_and_value(name: str) -> None:
    with pytest.raises(ValueError, match=rf"sets {name}=.*remove it") as caught:
        resolve_settings(config_of(**{name: REFUSED_VALUES[name]}))
    assert "\n" not in str(caught.value)
    assert " ".join(repr(REFUSED_VALUES[name]).split()) in str(caught.value)
    for harmless in REFUSED[name]:
        resolve_settings(config_of(**{name: harmless}))


def test_a_field_of_a_newer_version_is_refused_unless_it_has_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"sets swiftness=0\.5, a field that draftsmith does not support"):
        resolve_settings(config_of(swiftness=0.5))
    resolve_settings(config_of(swiftness=None))
    original = GenerationConfig.__init__

    def newer(self: GenerationConfig, **kwargs: Any) -> None:
        original(self, **kwargs)
        self.swiftness = kwargs.get("swiftness", 1.0)

    monkeypatch.setattr(GenerationConfig, "__init__", newer)
    resolve_settings(GenerationConfig())
    with pytest.raises(ValueError, match="swiftness=2"):
        resolve_settings(GenerationConfig(swiftness=2.0))


def test_a_field_in_the_file_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "chat_speed": "high"}))
    with pytest.raises(ValueError, match="sets chat_speed='high'"):
        resolve_settings(GenerationConfig.from_pretrained(tmp_path))


def test_min_new_tokens_overrides_min_length_as_in_transformers(
    model: Any, draft: Any, tokenizer: Any, plain: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    eos = filled("eos", plain, tokenizer)
    for minima in ({"min_length": 30, "min_new_tokens": 2}, {"min_length": 30, "min_new_tokens": 0}):
        config = config_of(eos_token_id=eos, pad_token_id=0, **minima)
        got = ours(model, draft, tokenizer, config)
        assert got[-1] == eos
        assert got == theirs(model, tokenizer, config, monkeypatch)


def test_settings_for_generate_replace_those_of_the_models_own_config(
    model: Any, tokenizer: Any, plain: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    eos = filled("eos", plain, tokenizer)
    monkeypatch.setattr(model, "generation_config", config_of(eos_token_id=eos, min_length=30, pad_token_id=0))
    wanted = plain[: plain.index(eos) + 1]
    kwargs = resolve_settings(None).generation_kwargs()
    out_1T = model.generate(torch.tensor([PROMPT]), max_new_tokens=NEW, **kwargs)
    assert out_1T[0, len(PROMPT) :].tolist() == wanted
    kwargs = resolve_settings(model.generation_config).generation_kwargs()
    out_1T = model.generate(torch.tensor([PROMPT]), max_new_tokens=NEW, **kwargs)
    assert len(out_1T[0]) > len(PROMPT) + len(wanted)
