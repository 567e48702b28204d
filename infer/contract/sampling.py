"""Sampling settings of a row, resolved once and shared by all decoders that are compared.

They come from the target's generation_config.json and the user's options. Processors are transformers' own. Settings
that verification of a tree cannot honour (beams, guidance, a second model, state between calls) raise ValueError:
infer/contract/generation_fields.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from draftsmith.infer.contract.generation_fields import check_fields

if TYPE_CHECKING:
    from transformers import GenerationConfig


@dataclass(frozen=True, slots=True)
class Settings:
    """How the next token is chosen. `temperature` 0 is greedy; then only the penalties and bans apply.

    `min_length` counts the prompt, and `min_new_tokens` overrides it, as in transformers.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, not {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie between 0 and 1, not {self.min_p}")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty must be above 0, not {self.repetition_penalty}")
        for name in ("min_length", "min_new_tokens", "no_repeat_ngram_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 (off) or more, not {getattr(self, name)}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def named(self) -> dict[str, Any]:
        """The temperature, and what differs from the defaults."""
        off = Settings().to_json()
        return {name: value for name, value in asdict(self).items() if name == "temperature" or value != off[name]}

    def generation_kwargs(self) -> dict[str, Any]:
        """The same settings for `model.generate`, each passed explicitly because its defaults differ from ours."""
        kwargs: dict[str, Any] = {"do_sample": not self.greedy, "num_beams": 1}
        if not self.greedy:
            kwargs |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
            kwargs |= {"min_p": self.min_p or None, "typical_p": self.typical_p}
            kwargs |= {"epsilon_cutoff": self.epsilon_cutoff, "eta_cutoff": self.eta_cutoff}
        kwargs |= {"repetition_penalty": self.repetition_penalty, "no_repeat_ngram_size": self.no_repeat_ngram_size}
        kwargs["bad_words_ids"] = [list(words) for words in self.bad_words_ids] or None
        kwargs["suppress_tokens"] = list(self.suppress_tokens) or None
        kwargs["begin_suppress_tokens"] = list(self.begin_suppress_tokens) or None
        if self.min_new_tokens:
            kwargs["min_new_tokens"] = self.min_new_tokens
        else:
            kwargs["min_length"] = self.min_length
        return kwargs

    def processors(self, eos_ids: list[int], prompt_tokens: int, device: torch.device) -> list[Any]:
        """The processors that read the prefix, in transformers' own order, with their tensors on `device`."""
        from transformers import generation as hf

        made: list[Any] = []
        eos = torch.tensor(eos_ids, device=device) if eos_ids else None
        if self.repetition_penalty != 1.0:
            made.append(hf.RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.no_repeat_ngram_size:
            made.append(hf.NoRepeatNGramLogitsProcessor(self.no_repeat_ngram_size))
        if self.bad_words_ids:
            made.append(hf.NoBadWordsLogitsProcessor([list(words) for words in self.bad_words_ids], eos))
        if eos is not None and self.min_length and not self.min_new_tokens:
            made.append(hf.MinLengthLogitsProcessor(self.min_length, eos))
        if eos is not None and self.min_new_tokens:
            made.append(hf.MinNewTokensLengthLogitsProcessor(prompt_tokens, self.min_new_tokens, eos))
        if self.suppress_tokens:
            made.append(hf.SuppressTokensLogitsProcessor(list(self.suppress_tokens), device))
        if self.begin_suppress_tokens:
            made.append(
                hf.SuppressTokensAtBeginLogitsProcessor(list(self.begin_suppress_tokens), prompt_tokens, device)
            )
        return made

    def warpers(self) -> list[Any]:
        """Temperature and truncations, which read the logits only, in transformers' own order; none when greedy."""
        from transformers import generation as hf

        if self.greedy:
            return []
        made: list[Any] = []
        if self.temperature != 1.0:
            made.append(hf.TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            made.append(hf.TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            made.append(hf.TopPLogitsWarper(self.top_p))
        if self.min_p:
            made.append(hf.MinPLogitsWarper(self.min_p))
        if self.typical_p < 1.0:
            made.append(hf.TypicalLogitsWarper(self.typical_p))
        if self.epsilon_cutoff:
            made.append(hf.EpsilonLogitsWarper(self.epsilon_cutoff))
        if self.eta_cutoff:
            made.append(hf.EtaLogitsWarper(self.eta_cutoff))
        return made


def resolve_settings(generation_config: GenerationConfig | None = None, **asked: Any) -> Settings:
    """The model's generation config, overridden by the `asked` settings that are not None.

    A field that neither sets is off. (`generate` would use top_k = 50; generation_kwargs() turns that off.)
    """
    known = {field.name for field in fields(Settings)}
    unknown = sorted(set(asked) - known)
    if unknown:
        raise ValueError(f"unknown sampling settings: {', '.join(unknown)} (known: {', '.join(sorted(known))})")
    values: dict[str, Any] = {}
    if generation_config is not None:
        check_fields(generation_config)
        for name in known - {"seed", "temperature"}:
            value = getattr(generation_config, name, None)
            if value is not None:
                values[name] = value
        if getattr(generation_config, "do_sample", None):
            values["temperature"] = 1.0 if generation_config.temperature is None else generation_config.temperature
    values |= {name: value for name, value in asked.items() if value is not None}
    if "min_new_tokens" in values:
        values["min_length"] = 0  # overridden, by 0 as well
    values["bad_words_ids"] = tuple(tuple(words) for words in values.get("bad_words_ids", ()))
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        values[name] = tuple(values.get(name, ()))
    return Settings(**values)
