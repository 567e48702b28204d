"""A row: one sequence being decoded, with its own settings, random stream and stop conditions.

Tokens that were committed but that a model has not read yet are *pending* for that model; how many is the model's own
bookkeeping. This module does not know models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from draftsmith.infer.contract.rng import StepRng
from draftsmith.infer.contract.sampling import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Stops:
    """When a row ends: stop token ids, stop strings (looked for in the new text), a number of new tokens."""

    max_new_tokens: int = 128
    ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if any(not text for text in self.strings):
            raise ValueError("a stop string must not be empty")


@dataclass(eq=False, slots=True)
class Row:
    """`ids` holds a copy of the prompt and what was committed; `stop` tells why the row ended, empty while it lives."""

    key: str
    ids: list[int]
    settings: Settings = field(default_factory=Settings)
    stops: Stops = field(default_factory=Stops)
    tokenizer: PreTrainedTokenizerBase | None = None
    prompt_tokens: int = 0
    stop: str = ""

    def __post_init__(self) -> None:
        if not self.ids:
            raise ValueError(f"prompt {self.key} is empty: there is no token to begin from")
        if self.stops.strings and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        self.ids = list(self.ids)  # the caller's prompt stays as it is: it may be asked again
        self.prompt_tokens = self.prompt_tokens or len(self.ids)

    @property
    def new_ids(self) -> list[int]:
        return self.ids[self.prompt_tokens :]

    @property
    def left(self) -> int:
        """How many tokens may still be committed."""
        return self.stops.max_new_tokens - (len(self.ids) - self.prompt_tokens)

    def stream(self) -> StepRng:
        return StepRng(self.settings.seed, self.key, len(self.ids))

    def turn(self, tokens: Sequence[int]) -> None:
        """Go on after a stop with a new chat turn: its tokens are pending like any others."""
        self.ids.extend(tokens)
        self.prompt_tokens = len(self.ids)
        self.stop = ""

    def cut(self, tokens: Sequence[int]) -> tuple[list[int], str]:
        """The leading `tokens` that may be committed, and why they end where they end ('' while the row goes on)."""
        kept: list[int] = []
        left = self.left
        for token in tokens:
            kept.append(token)
            if token in self.stops.ids:
                return kept, "eos"
            if self.stops.strings:
                found = self._stop_string(kept)
                if found is not None:
                    return kept, f"stop string {found!r}"
            if len(kept) >= left:
                return kept, "max_new_tokens"
        return kept, ""

    def _stop_string(self, kept: list[int]) -> str | None:
        """The stop string that the newest token completes. Earlier text holds none, so a short tail is enough."""
        assert self.tokenizer is not None
        longest = max(len(text.encode()) for text in self.stops.strings)
        new = len(self.ids) - self.prompt_tokens
        tail = self.ids[len(self.ids) - min(new, longest + 4) :] if new else []
        text = str(self.tokenizer.decode(tail + kept, skip_special_tokens=False))
        return next((stop for stop in self.stops.strings if stop in text), None)
