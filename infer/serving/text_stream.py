"""Text of a row as its tokens arrive: whole characters only, and nothing that a stop string may still cut off.

The pieces do not depend on how many tokens arrive at a time, so an answer is the same streamed or at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"
# The most tokens that are decoded together; bytes that make no character by then never will.
WINDOW = 48


class Detokenizer:
    """Tokens to text, one after the other. A few earlier tokens are decoded with each, because tokenizers put spaces
    by what comes before."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._read = 0  # how many of these are context only
        self._given = ""  # what they and the others have given so far

    def add(self, token: int) -> str:
        """The text that is certain now; it may be empty."""
        self._ids.append(token)
        text = self._decoded(self._ids)
        whole = not text.endswith(UNFINISHED)
        full = len(self._ids) - self._read > WINDOW
        certain = text if whole or full else text.rstrip(UNFINISHED)
        if not certain.startswith(self._given):
            # Bytes that make no character take the characters beside them along in some tokenizers.
            certain = self._given + certain[len(self._given) :] if full else self._given
        new, self._given = certain[len(self._given) :], certain
        if (whole and new) or full:
            self._ids = self._ids[self._read :]
            self._read = len(self._ids)
            self._given = self._decoded(self._ids)
        return new

    def finish(self) -> str:
        """What is left: the beginning of a character that never came to its end."""
        text = self._decoded(self._ids)
        new = text[len(self._given) :] if text.startswith(self._given) else ""
        self._ids, self._read, self._given = [], 0, ""
        return new

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class TextStream:
    """One row's text. `stops`: its stop strings, which are not part of the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = stops
        self._held = ""
        self.given = 0  # characters that were handed out
        # By token: how many characters come before its text.
        self.offsets: list[int] = []

    def add(self, tokens: Sequence[int], stop: str = "") -> str:
        """The text to show after these tokens. `stop`: why the row ended with them, as `Row.stop`; else empty."""
        for token in tokens:
            self.offsets.append(self.given + len(self._held))
            self._held += self._detokenizer.add(token)
        if stop:
            self._held += self._detokenizer.finish()
            ready = self._before_stop() if stop.startswith("stop string") else self._held
            self._held = ""
        else:
            ready = self._held[: len(self._held) - self._may_begin_a_stop()]
            self._held = self._held[len(ready) :]
        self.given += len(ready)
        return ready

    def _before_stop(self) -> str:
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        return self._held[: min(found)] if found else self._held

    def _may_begin_a_stop(self) -> int:
        """How many characters at the end of the held text may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[len(self._held) - length :]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
