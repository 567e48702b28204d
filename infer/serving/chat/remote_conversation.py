"""A conversation with an OpenAI-compatible server, streamed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

from draftsmith.infer.answers.server_client import Server
from draftsmith.infer.serving.chat.conversation import SaidText
from draftsmith.infer.text.record import Message


class RemoteConversation:
    """With `model` of the server at `url` (its root or its /v1); "" is the first that it lists.

    `fields`: of chat completions, for every request.
    """

    def __init__(self, url: str, model: str = "", api_key: str = "", timeout_s: float = 600.0, **fields: Any) -> None:
        server = Server(url, model, api_key, timeout_s)
        self._server = server if model else replace(server, model=server.models()[0])
        self.fields = {name: value for name, value in fields.items() if value is not None}
        self.messages: list[Message] = []
        self.system = ""
        self._stats = "nothing was said yet"

    @property
    def model(self) -> str:
        return self._server.model

    def reset(self) -> None:
        self.messages, self._stats = [], "nothing was said yet"

    def stats(self) -> str:
        return self._stats

    def ask(self, text: str) -> Iterator[SaidText]:
        messages = [*self.messages, Message("user", text)]
        head = [Message("system", self.system)] if self.system else []
        body = {
            "model": self.model,
            "messages": [message.to_chat() for message in [*head, *messages]],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        began, first, usage, answer = time.monotonic(), 0.0, dict[str, Any](), ""
        with closing(self._server.open("/chat/completions", body | self.fields)) as response:
            self.messages = messages
            try:
                for chunk in self._server.events(response):
                    usage = chunk.get("usage") or usage
                    said = "".join(one.get("delta", {}).get("content") or "" for one in chunk.get("choices") or ())
                    if said:
                        first = first or time.monotonic()
                        answer += said
                        yield SaidText(said)
            finally:
                self.messages.append(Message("assistant", answer))
                ended = time.monotonic()
                tokens = usage.get("completion_tokens")
                speed = f"{(tokens - 1) / (ended - first):.1f} tokens/s" if tokens and ended > first else "- tokens/s"
                self._stats = (
                    f"{'-' if tokens is None else tokens} tokens, {speed}, first after {max(first - began, 0):.2f} s; "
                    f"{usage.get('prompt_tokens', '-')} tokens of context, by {self.model} at {self._server.root}"
                )
