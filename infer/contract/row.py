"""A row: one sequence being decoded, with its own settings, random stream and stop conditions.

Tokens that are committed but not yet in a model's cache are *pending* for that model, which keeps count of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from draftsmith.infer.contract.arguments import at_least
from draftsmith.infer.contract.rng import StepRng
from draftsmith.infer.contract.sampling import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Prompts that begin with the same tokens share them in lots of this size.
SHARED_BY = 64


@dataclass(frozen=True, slots=True)
class Stops:
    """When a row ends: at stop token ids, at stop strings in the new text, or after a number of new tokens."""

    max_new_tokens: int = 128
    ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least(1, max_new_tokens=self.max_new_tokens)
        if any(not text for text in self.strings):
            raise ValueError("a stop string must not be empty")


@dataclass(eq=False, slots=True)
class Row:
    """`ids` holds the prompt and the committed tokens; `stop` is why the row ended, empty while it is live.

    `processors`, if given, are all that shape the target's logits, in place of those that `settings` would make. Each
    takes the ids [1, T] and the logits [1, V] and returns logits, as transformers' do, from its arguments alone.
    """

    key: str
    ids: list[int]
    settings: Settings = field(default_factory=Settings)
    stops: Stops = field(default_factory=Stops)
    tokenizer: PreTrainedTokenizerBase | None = None
    prompt_tokens: int = 0
    stop: str = ""
    processors: Sequence[Callable[[Any, Any], Any]] | None = None

    def __post_init__(self) -> None:
        if not self.ids:
            raise ValueError(f"prompt {self.key} is empty: decoding needs at least one token")
        if self.stops.strings and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        self.ids = list(self.ids)  # a copy: the caller may use the prompt again
        self.prompt_tokens = self.prompt_tokens or len(self.ids)

    def begins_as(self, other: Row) -> int:
        """How many tokens both begin with, in whole lots of SHARED_BY, and without this row's last two."""
        most = min(len(self.ids) - 2, len(other.ids))
        same = next((at for at in range(most) if self.ids[at] != other.ids[at]), max(most, 0))
        return same - same % SHARED_BY

    @property
    def new_ids(self) -> list[int]:
        return self.ids[self.prompt_tokens :]

    @property
    def left(self) -> int:
        """The number of tokens that may still be committed."""
        return self.stops.max_new_tokens - (len(self.ids) - self.prompt_tokens)

    def check(self, vocab_size: int, max_positions: int) -> None:
        """ValueError unless a target with this vocabulary and context can decode the row."""
        if len(self.ids) >= max_positions:
            raise ValueError(
                f"prompt {self.key} has {len(self.ids)} tokens, but the target's context ends at {max_positions}"
            )
        if not 0 <= min(self.ids) <= max(self.ids) < vocab_size:
            raise ValueError(f"prompt {self.key} has a token id outside the target's vocabulary of {vocab_size}")

    def stream(self) -> StepRng:
        return StepRng(self.settings.seed, self.key, len(self.ids))

    def turn(self, tokens: Sequence[int]) -> None:
        """Continue after a stop with a new chat turn; its tokens are pending like any others."""
        self.ids.extend(tokens)
        self.prompt_tokens = len(self.ids)
        self.stop = ""

    def cut(self, tokens: Sequence[int]) -> tuple[list[int], str]:
        """The leading `tokens` that may be committed, and why the row stops after them ('' if it does not)."""
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
        """The stop string that the newest token completes. Earlier text has none, so a short tail is decoded."""
        assert self.tokenizer is not None
        longest = max(len(text.encode()) for text in self.stops.strings)
        new = len(self.ids) - self.prompt_tokens
        tail = self.ids[len(self.ids) - min(new, longest + 4) :] if new else []
        text = str(self.tokenizer.decode(tail + kept, skip_special_tokens=False))
        return next((stop for stop in self.stops.strings if stop in text), None)
