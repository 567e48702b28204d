"""Texts of a target, each token with its log-probability as it was drawn: from logs, or scored by the target.

What a server logs by default is the model's own log-probability, before temperature and truncation
(`raw_logprobs`, as vLLM calls it), which at another temperature than 1 is that of another distribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from draftsmith.infer.contract.protocols import Target
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.engine.logprobs import score_texts
from draftsmith.infer.measure.recordings import Recording

LogprobsMode = Literal["processed", "raw"]
# Rounding may lift a logged log-probability above 0 by this much.
ROUNDING = 1e-3
# What a request may name besides our settings, with the values that change nothing.
OF_SERVERS: dict[str, Any] = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": {}}


@dataclass(frozen=True, slots=True)
class DrawnText:
    """Token ids of a prompt and of the answer that a target drew, and log(target_probs) of each answer token."""

    key: str
    prompt: Sequence[int]
    answer: Sequence[int]
    target_logprobs_T: np.ndarray


def logged_settings(streams: Sequence[Recording], asked: Mapping[str, Any]) -> dict[str, Any]:
    """How the logs say that their tokens were drawn, with what they leave open as `asked`. ValueError if they differ
    from one another or from what was asked, or if nobody names the temperature."""
    said = [one for one in streams if one.sampling]
    known = _switched_on(said[0].sampling) if said else {}
    for one in said:
        if _switched_on(one.sampling) != known:
            raise ValueError(
                f"{said[0].key} and {one.key} were drawn with different settings ({known} and "
                f"{_switched_on(one.sampling)}): forecast them one setting at a time"
            )
    off = Settings().to_json()
    for name, value in asked.items() if said else ():
        left_open = value if name == "temperature" else off[name]
        if (logged := known.get(name, left_open)) != value:
            raise ValueError(f"--{name} {value} was given, but the logs were drawn with {name} {logged}")
    silent = next((one for one in streams if "temperature" not in one.sampling), None)
    if silent is not None and "temperature" not in asked:
        raise ValueError(
            f"{silent.key} does not say at what temperature it was drawn: give --temperature, 0 if it is greedy"
        )
    found = {**known, **asked}
    if strange := sorted(set(found) - {field.name for field in fields(Settings)}):
        raise ValueError(f"{streams[0].key} was drawn with {', '.join(strange)}, which cannot be forecast")
    return found


def _switched_on(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that change the distribution, and the temperature."""
    off = Settings().to_json() | OF_SERVERS
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in sampling.items()}
    return {
        name: value
        for name, value in given.items()
        if name == "temperature" or (name != "seed" and value != off.get(name) and (name, value) != ("top_k", -1))
    }


def greedy_texts(streams: Sequence[Recording]) -> list[DrawnText]:
    """The texts of a greedy target, which needs no log-probabilities: each token was certain."""
    return [DrawnText(one.key, one.prompt, one.answer, np.zeros(len(one.answer))) for one in streams]


def logged_texts(
    streams: Sequence[Recording], settings: Settings, stated: LogprobsMode | Literal[""] = ""
) -> list[DrawnText]:
    """The texts with the log-probabilities of their logs. `stated`: what the user says that these are."""
    for one in streams:
        if not one.logprobs:
            raise ValueError(
                f"{one.key} has no log-probabilities of its tokens: log them, write answers with `draftsmith answers "
                "--logprobs`, or compute them with `draftsmith forecast --target`"
            )
        if len(one.logprobs) != len(one.answer):
            raise ValueError(
                f"{one.key} has {len(one.logprobs)} log-probabilities for {len(one.answer)} tokens: log token_ids as "
                "well, or compute them with `draftsmith forecast --target`"
            )
        mode = stated or one.logprobs_mode.removesuffix("_logprobs")
        if mode != "processed" and not _same_raw(settings):
            said = "are raw" if mode == "raw" else "may be raw (before temperature and truncation)"
            raise ValueError(
                f"the log-probabilities of {one.key} {said}, and its tokens were not drawn at temperature 1 without "
                "truncation: compute them with `draftsmith forecast --target`, or say `--logprobs_mode processed` "
                "there if the server logged those"
            )
    return [_drawn(one, one.logprobs) for one in streams]


def _same_raw(settings: Settings) -> bool:
    """Whether nothing shapes the model's own distribution."""
    return settings == Settings(temperature=1.0, seed=settings.seed)


def scored_texts(
    target: Target, streams: Sequence[Recording], settings: Settings, batch_size: int = 8
) -> list[DrawnText]:
    """The texts with the log-probabilities that `target` gives them under `settings`, by one pass over each."""
    texts = {one.key: (one.prompt, one.answer) for one in streams}
    found = score_texts(target, texts, settings, batch_size)
    return [_drawn(one, found[one.key]) for one in streams]


def _drawn(one: Recording, logprobs: Sequence[float]) -> DrawnText:
    logs_T = np.asarray(logprobs, dtype=np.float64)
    impossible = ~np.isfinite(logs_T) | (logs_T <= -9999)  # which is how vLLM writes minus infinity
    if impossible.any():
        raise ValueError(
            f"{one.key} was not drawn with these settings: its token {int(impossible.argmax())} has probability 0; "
            "check --temperature, --top_k and --top_p, and that the target is the one that wrote it"
        )
    if (logs_T > ROUNDING).any():
        raise ValueError(f"{one.key} holds a log-probability above 0: {logs_T.max():g}")
    return DrawnText(one.key, one.prompt, one.answer, np.minimum(logs_T, 0.0))
