"""Answers as OpenAI's clients read them: chat completions and completions, whole or in chunks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from draftsmith.infer.serving.answer import NewText, Usage
from draftsmith.infer.serving.noted_logprobs import TokenLogprobs
from draftsmith.infer.serving.text_stream import UNFINISHED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# JSON has no infinity; OpenAI writes this.
LEAST_LOGPROB = -9999.0


@dataclass(slots=True)
class ChatFormat:
    """`logprobs`, `token_ids`: whether the request asked for them."""

    model: str
    tokenizer: PreTrainedTokenizerBase
    logprobs: bool = False
    token_ids: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[NewText], usage: Usage, prompts: Sequence[list[int]]) -> dict[str, Any]:
        choices = [
            {
                "index": one.index,
                "message": {"role": "assistant", "content": one.text, "refusal": None},
                "logprobs": self._logprobs(one),
                "finish_reason": one.finish,
                **({"token_ids": one.tokens} if self.token_ids else {}),
            }
            for one in answers
        ]
        made = self._head("chat.completion") | {"choices": choices, "usage": usage.to_json()}
        return made | ({"prompt_token_ids": prompts[0]} if self.token_ids else {})

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of an answer."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, piece: NewText) -> list[dict[str, Any]]:
        """The chunks of a piece: its text, and the end."""
        made = []
        if piece.text or piece.logprobs or (self.token_ids and piece.tokens):
            chunk = self._chunk(piece.index, {"content": piece.text})
            chunk["choices"][0]["logprobs"] = self._logprobs(piece)
            if self.token_ids:
                chunk["choices"][0]["token_ids"] = piece.tokens
            made.append(chunk)
        if piece.finish:
            made.append(self._chunk(piece.index, {}, piece.finish))
        return made

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The last chunk, for those who asked for it."""
        return self._head("chat.completion.chunk") | {"choices": [], "usage": usage.to_json()}

    def _chunk(self, index: int, delta: dict[str, Any], finish: str = "") -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish or None}
        return self._head("chat.completion.chunk") | {"choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, piece: NewText) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = []
        for one in piece.logprobs:
            top = [self._entry(token, logprob) for token, logprob in one.top]
            content.append(self._entry(one.token, one.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = token_text(self.tokenizer, token)
        known = None if UNFINISHED in text else list(text.encode())
        return {"token": text, "logprob": _finite(logprob), "bytes": known}


@dataclass(slots=True)
class CompletionFormat:
    """`logprobs`, `token_ids`: whether the request asked for them."""

    model: str
    tokenizer: PreTrainedTokenizerBase
    logprobs: bool = False
    token_ids: bool = False
    id: str = field(default_factory=lambda: f"cmpl-{uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[NewText], usage: Usage, prompts: Sequence[list[int]]) -> dict[str, Any]:
        samples = len(answers) // len(prompts)
        choices = [self._choice(one, one.finish) for one in answers]
        if self.token_ids:
            for choice in choices:
                choice["prompt_token_ids"] = prompts[choice["index"] // samples]
        return self._head() | {"choices": choices, "usage": usage.to_json()}

    def opening(self, index: int) -> dict[str, Any] | None:
        """None: a completion has no role to begin with."""
        return None

    def piece(self, piece: NewText) -> list[dict[str, Any]]:
        if not (piece.text or piece.finish or piece.logprobs or (self.token_ids and piece.tokens)):
            return []
        return [self._head() | {"choices": [self._choice(piece, piece.finish)]}]

    def usage(self, usage: Usage) -> dict[str, Any]:
        return self._head() | {"choices": [], "usage": usage.to_json()}

    def _choice(self, piece: NewText, finish: str) -> dict[str, Any]:
        made = {
            "index": piece.index,
            "text": piece.text,
            "logprobs": self._logprobs(piece),
            "finish_reason": finish or None,
        }
        return made | ({"token_ids": piece.tokens} if self.token_ids else {})

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}

    def _logprobs(self, piece: NewText) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return {
            "tokens": [token_text(self.tokenizer, one.token) for one in piece.logprobs],
            "token_logprobs": [_finite(one.logprob) for one in piece.logprobs],
            "top_logprobs": [self._top(one) for one in piece.logprobs],
            "text_offset": piece.offsets,
        }

    def _top(self, one: TokenLogprobs) -> dict[str, float]:
        """By text; of tokens that read alike, the likeliest."""
        made: dict[str, float] = {}
        for token, logprob in [*one.top, (one.token, one.logprob)]:
            made.setdefault(token_text(self.tokenizer, token), _finite(logprob))
        return made


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
