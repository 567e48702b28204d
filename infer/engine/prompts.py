"""Rows made of prompts: texts, conversations or token ids, with the fields of transformers' GenerationConfig."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from draftsmith.infer.contract.generation_fields import HONOURED, REFUSED
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import resolve_settings
from draftsmith.infer.text.record import Message
from draftsmith.infer.text.templates import find_template

if TYPE_CHECKING:
    from draftsmith.infer.contract.protocols import Target
    from draftsmith.infer.text.rendering import Template

# A text, token ids, or the messages of a conversation as dicts with `role` and `content`.
Prompt = str | Sequence[int] | Sequence[Message] | Sequence[Mapping[str, str]]

NEW_TOKENS = 128


def as_prompts(prompts: Prompt | Iterable[Prompt]) -> list[tuple[str, Prompt]]:
    """(key, prompt) of each, numbered; one prompt alone is a list of one."""
    given: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    if given and isinstance(given[0], (int, Message, Mapping)):
        given = [given]
    return [(str(number), prompt) for number, prompt in enumerate(given)]


def rows_of(
    target: Target,
    prompts: Sequence[tuple[str, Prompt]],
    *,
    template: str | Template = "auto",
    system: str = "",
    seed: int = 0,
    stop: Sequence[str] = (),
    stop_ids: Iterable[int] = (),
    **fields: Any,
) -> list[Row]:
    """A row for each (key, prompt); ValueError for a field that is unknown or that lossless drafting cannot honour.

    Args:
        target: its generation_config.json is where the fields begin.
        prompts: the key seeds a row's random numbers.
        template: how texts and conversations become token ids: a Template or its name, as of `--template`.
        system: a system message, for prompts that have none.
        seed: of sampling.
        stop: strings that end an answer, in addition to the model's own.
        stop_ids: token ids that do.
        fields: of GenerationConfig; None leaves the model's own. `temperature` alone turns sampling on above 0, and off
            at 0.
    """
    asked = {name: value for name, value in fields.items() if value is not None}
    most = asked.pop("max_new_tokens", NEW_TOKENS)
    _check(asked)
    model_config = getattr(target, "generation_config", None)
    if model_config is None:
        raise ValueError("this target holds recorded answers: prompts need a model")
    if "temperature" in asked:
        asked.setdefault("do_sample", asked["temperature"] > 0)
    config = copy.deepcopy(model_config)
    for name, value in asked.items():
        setattr(config, name, value)
    settings = resolve_settings(config, seed=seed)
    stops = _stops(target, config, most, asked, stop, stop_ids)
    form = template
    rows = []
    for key, prompt in prompts:
        if _is_ids(prompt):
            ids = [int(token) for token in prompt]  # type: ignore[arg-type]
        else:
            form = _template(form, target)
            ids = form.prompt_ids(_messages(prompt, system))
        rows.append(Row(key, ids, settings, stops, target.tokenizer))
    return rows


def _check(asked: Mapping[str, Any]) -> None:
    for name in asked:
        if name in REFUSED:
            if asked[name] not in REFUSED[name]:
                raise ValueError(f"{name}={asked[name]!r}: lossless drafting does not support it")
        elif name not in HONOURED:
            known = ", ".join(sorted({*HONOURED, "max_new_tokens"}))
            raise ValueError(f"{name} is not a field that changes decoding here; known are {known}")


def _stops(
    target: Any, config: Any, most: int, asked: Mapping[str, Any], strings: Sequence[str], ids: Iterable[int]
) -> Stops:
    """As `generate` reads them: eos_token_id and stop_strings override the model's own."""
    eos = config.eos_token_id if "eos_token_id" in asked else target.eos_ids
    own = [config.stop_strings] if isinstance(config.stop_strings, str) else config.stop_strings or []
    known = {eos} if isinstance(eos, int) else set(eos)
    return Stops(most, frozenset(known.union(ids)), tuple(dict.fromkeys([*own, *strings])))


def _is_ids(prompt: Any) -> bool:
    return not isinstance(prompt, str) and len(prompt) > 0 and not isinstance(prompt[0], (Message, Mapping))


def _template(form: str | Template, target: Target) -> Template:
    if not isinstance(form, str):
        return form
    if target.tokenizer is None:
        raise ValueError("this target has no tokenizer: give prompts as token ids")
    return find_template(form, target.tokenizer)


def _messages(prompt: Any, system: str) -> list[Message]:
    if isinstance(prompt, str):
        made = [Message("user", prompt)]
    else:
        made = [one if isinstance(one, Message) else Message(**one) for one in prompt]
    if not made:
        raise ValueError("a prompt has no messages")
    if system and made[0].role != "system":
        made.insert(0, Message("system", system))
    return made
