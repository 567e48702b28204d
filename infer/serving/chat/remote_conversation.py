"""A conversation with an OpenAI-compatible server, streamed."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPException
from typing import Any

from draftsmith.infer.serving.chat.conversation import SaidText
from draftsmith.infer.text.record import Message


class RemoteConversation:
    """With `model` of the server at `url` (its root or its /v1); "" is the first that it lists.

    `fields`: of chat completions, for every request.
    """

    def __init__(self, url: str, model: str = "", api_key: str = "", timeout_s: float = 600.0, **fields: Any) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"the server's address {url!r} must begin with http:// or https://")
        root = url.rstrip("/")
        self.url = root if root.endswith("/v1") else f"{root}/v1"
        self.fields = {name: value for name, value in fields.items() if value is not None}
        self.messages: list[Message] = []
        self.system = ""
        self._headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {api_key}"} if api_key else {}
        )
        self._timeout_s = timeout_s
        self._stats = "nothing was said yet"
        self.model = model or self._first_model()

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
        with closing(self._open("/chat/completions", body | self.fields)) as response:
            self.messages = messages
            try:
                for chunk in self._chunks(response):
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
                    f"{usage.get('prompt_tokens', '-')} tokens of context, by {self.model} at {self.url}"
                )

    def _chunks(self, response: Any) -> Iterator[dict[str, Any]]:
        """The objects of server-sent events."""
        try:
            for line in response:
                if not line.startswith(b"data:"):
                    continue
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                found = json.loads(data)
                if "error" in found:
                    raise ValueError(f"{self.url} ended the answer with an error: {_message(found)}")
                yield found
        except (OSError, HTTPException, json.JSONDecodeError) as problem:
            raise ValueError(f"{self.url} broke off the answer: {problem}") from problem

    def _first_model(self) -> str:
        with closing(self._open("/models")) as response:
            try:
                return str(json.load(response)["data"][0]["id"])
            except (ValueError, KeyError, IndexError, TypeError) as problem:
                raise ValueError(f"{self.url} lists no models: name one with --model") from problem

    def _open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self._headers)
        try:
            return urllib.request.urlopen(request, timeout=self._timeout_s)
        except urllib.error.HTTPError as problem:
            with problem:
                text = problem.read().decode(errors="replace")
            try:
                reason = _message(json.loads(text))
            except ValueError:
                reason = text[:200]
            raise ValueError(f"{self.url}{path} refused with {problem.code}: {reason}") from problem
        except (OSError, HTTPException) as problem:
            raise ValueError(f"{self.url} does not answer: {getattr(problem, 'reason', problem)}") from problem


def _message(found: Any) -> str:
    error = found.get("error", found) if isinstance(found, dict) else found
    return str(error.get("message", error) if isinstance(error, dict) else error)
