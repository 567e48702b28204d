"""A client of OpenAI-compatible servers: chat completions, whole and streamed, the models listed, and `/metrics`."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.text.record import Message

TRIES = 4
WAIT_S = 0.5
BUSY = (408, 429, 500, 502, 503, 504)
# How OpenAI, vLLM, SGLang, llama.cpp and TGI say that a prompt does not fit: most have no code for it.
_BEYOND_CONTEXT = re.compile(
    r"context_length_exceeded|context (length|size|window)|context of \d|model length|must have less than \d+ tokens",
    re.IGNORECASE,
)


class RefusedError(ValueError):
    """A request that got an HTTP status of 400 or above, with the server's reason."""

    def __init__(self, url: str, status: int, body: str) -> None:
        try:
            reason = _reason(json.loads(body))
        except ValueError:
            reason = body
        super().__init__(f"{url} refused with {status}: {reason[:300]}")
        self.status = status
        self.beyond_context = status == 413 or (status in (400, 422) and bool(_BEYOND_CONTEXT.search(body)))


class NoAnswerError(ValueError):
    """A server that cannot be reached, or that broke off."""


@dataclass(frozen=True, slots=True)
class StreamedAnswer:
    """`first_s` and `last_s`: from the request until the first and the last piece of text.

    Tokens are those of the server's usage; `cached` are prompt tokens that were in its cache, None if it does not say.
    """

    text: str
    stop: str
    first_s: float
    last_s: float
    tokens: int
    prompt_tokens: int
    cached: int | None


@dataclass(frozen=True, slots=True)
class Server:
    """`url`: the server's root or its /v1. `model`: the name that it serves."""

    url: str
    model: str = ""
    api_key: str = ""
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"the server's address {self.url!r} must begin with http:// or https://")

    @property
    def root(self) -> str:
        """Where OpenAI's endpoints are: the /v1."""
        url = self.url.rstrip("/")
        return url if url.endswith("/v1") else f"{url}/v1"

    def models(self) -> list[str]:
        """The names of the models that it lists."""
        with closing(self.open("/models")) as response:
            try:
                names = [str(one["id"]) for one in json.load(response)["data"]]
            except (ValueError, KeyError, TypeError) as problem:
                raise ValueError(f"{self.root} lists no models: name one with --model") from problem
        if not names:
            raise ValueError(f"{self.root} lists no models: name one with --model")
        return names

    def metrics(self) -> str | None:
        """What `/metrics` shows; None if there is no such page."""
        try:
            with closing(self._open(self.root.removesuffix("/v1") + "/metrics", None)) as response:
                return str(response.read().decode(errors="replace"))
        except RefusedError:
            return None

    def chat(self, messages: Sequence[Message], settings: Settings, max_new_tokens: int) -> dict[str, Any]:
        """The first choice of the response to `messages`."""
        answer = self._post("/chat/completions", self._body(messages, settings, max_new_tokens, return_token_ids=True))
        try:
            choice: dict[str, Any] = answer["choices"][0]
            text = choice["message"]["content"] or ""
        except (KeyError, IndexError, TypeError) as problem:
            raise ValueError(f"{self.url} sent an answer that is not OpenAI-compatible") from problem
        ids = {"prompt_token_ids": answer.get("prompt_token_ids"), "token_ids": choice.get("token_ids")}
        if not isinstance(text, str) or not all(value is None or _are_ids(value) for value in ids.values()):
            raise ValueError(f"{self.url} sent an answer with malformed content or token ids")
        return {"text": text, "stop": str(choice.get("finish_reason") or "")} | ids

    def stream(self, messages: Sequence[Message], settings: Settings, max_new_tokens: int) -> StreamedAnswer:
        """The answer to `messages`, streamed and timed. It is asked for once: a refusal raises."""
        body = self._body(messages, settings, max_new_tokens, stream=True, stream_options={"include_usage": True})
        pieces: list[str] = []
        first = last = 0.0
        stop, usage = "", dict[str, Any]()
        began = time.perf_counter()
        try:
            with closing(self.open("/chat/completions", body)) as response:
                for chunk in self.events(response):
                    usage = chunk.get("usage") or usage
                    for choice in chunk.get("choices") or ():
                        last = time.perf_counter() - began
                        pieces.append(_text_of(choice.get("delta") or {}))
                        first = first or (last if pieces[-1] else 0.0)
                        stop = choice.get("finish_reason") or stop
            text, details = "".join(pieces), usage.get("prompt_tokens_details") or {}
            tokens, prompt_tokens, cached = (
                usage.get("completion_tokens"), usage.get("prompt_tokens"), details.get("cached_tokens")
            )  # fmt: skip
        except (AttributeError, TypeError) as problem:
            raise ValueError(f"{self.root} sent a stream that is not OpenAI-compatible") from problem
        if not isinstance(tokens, int) or not isinstance(prompt_tokens, int):
            raise ValueError(
                f"{self.root} counts no tokens of streamed answers: it must know stream_options.include_usage"
            )
        return StreamedAnswer(text, str(stop), first or last, last, tokens, prompt_tokens, cached)

    def open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The response to GET, or to POST of `body`; RefusedError or NoAnswerError if there is none."""
        return self._open(self.root + path, body)

    def events(self, response: Any) -> Iterator[dict[str, Any]]:
        """The objects of a streamed response."""
        try:
            for line in response:
                if not line.startswith(b"data:"):
                    continue
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                found = json.loads(data)
                if not isinstance(found, dict):
                    raise ValueError(f"{self.root} sent a piece of an answer that is not OpenAI-compatible")
                if "error" in found:
                    raise ValueError(f"{self.root} ended the answer with an error: {_reason(found)}")
                yield found
        except (OSError, HTTPException, json.JSONDecodeError) as problem:
            raise NoAnswerError(f"{self.root} broke off the answer: {problem}") from problem

    def _body(
        self, messages: Sequence[Message], settings: Settings, max_new_tokens: int, **fields: Any
    ) -> dict[str, Any]:
        body = {
            "model": self.model,
            "messages": [message.to_chat() for message in messages],
            "max_tokens": max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": settings.seed,
        }
        return body | ({"top_k": settings.top_k} if settings.top_k else {}) | fields

    def _open(self, url: str, body: dict[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
        try:
            return urllib.request.urlopen(request, timeout=self.timeout_s)
        except urllib.error.HTTPError as problem:
            with problem:
                raise RefusedError(url, problem.code, problem.read().decode(errors="replace")) from problem
        except (OSError, HTTPException) as problem:
            reason = getattr(problem, "reason", problem)
            raise NoAnswerError(f"{self.root} does not answer: {reason}") from problem

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST; busy servers, broken connections and malformed JSON are retried, other HTTP errors are not."""
        for attempt in range(1, TRIES + 1):
            try:
                with closing(self.open(path, body)) as response:
                    found: dict[str, Any] = json.load(response)
                    return found
            except RefusedError as problem:
                if problem.status not in BUSY or attempt == TRIES:
                    raise
            except NoAnswerError:
                if attempt == TRIES:
                    raise
            except (OSError, HTTPException) as problem:
                if attempt == TRIES:
                    raise NoAnswerError(f"{self.root} broke off the answer: {problem}") from problem
            except ValueError as problem:
                if attempt == TRIES:
                    raise ValueError(f"{self.root} sent an answer that is not JSON: {problem}") from problem
            time.sleep(WAIT_S * 2 ** (attempt - 1))
        raise AssertionError("every way out of the loop returns or raises")


def _text_of(delta: dict[str, Any]) -> str:
    """Thoughts are tokens like others; their field has two names."""
    thoughts: str = delta.get("reasoning_content") or delta.get("reasoning") or ""
    return thoughts + (delta.get("content") or "")


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)


def _reason(found: Any) -> str:
    """The message of an error, in any of the shapes that servers give it."""
    error = found.get("error", found) if isinstance(found, dict) else found
    return str(error.get("message", error) if isinstance(error, dict) else error)
