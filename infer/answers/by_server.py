"""A target's own answers to prompts, from an OpenAI-compatible server: concurrent requests, with retries.

Token ids are the server's own if it returns them (vLLM does on request), otherwise its text under the given tokenizer;
the row's `token_ids_from` says which.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from draftsmith.infer.answers.answer_file import AnswerFile, Conversation, KeyedRecord
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.text.record import Message, Record
from draftsmith.infer.text.rendering import Template, last_answer

TRIES = 4
WAIT_S = 0.5


@dataclass(frozen=True, slots=True)
class Server:
    """`url`: the server's root or its /v1. `model`: the name that it serves."""

    url: str
    model: str
    api_key: str = ""
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"the server's address {self.url!r} must begin with http:// or https://")

    def chat(self, messages: Sequence[Message], settings: Settings, max_new_tokens: int) -> dict[str, Any]:
        """The first choice of the response to `messages`."""
        body = {
            "model": self.model,
            "messages": [message.to_chat() for message in messages],
            "max_tokens": max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": settings.seed,
            "return_token_ids": True,
        }
        if settings.top_k:
            body["top_k"] = settings.top_k
        answer = self._post("/chat/completions", body)
        try:
            choice: dict[str, Any] = answer["choices"][0]
            text = choice["message"]["content"] or ""
        except (KeyError, IndexError, TypeError) as problem:
            raise ValueError(f"{self.url} sent an answer that is not OpenAI-compatible") from problem
        ids = {"prompt_token_ids": answer.get("prompt_token_ids"), "token_ids": choice.get("token_ids")}
        if not isinstance(text, str) or not all(value is None or _are_ids(value) for value in ids.values()):
            raise ValueError(f"{self.url} sent an answer with malformed content or token ids")
        return {"text": text, "stop": str(choice.get("finish_reason") or "")} | ids

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST; busy servers, broken connections and malformed JSON are retried, other HTTP errors are not."""
        root = self.url.rstrip("/")
        url = (root if root.endswith("/v1") else root + "/v1") + path
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        for attempt in range(1, TRIES + 1):
            request = urllib.request.Request(url, json.dumps(body).encode(), headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    found: dict[str, Any] = json.load(response)
                    return found
            except urllib.error.HTTPError as problem:
                detail = problem.read().decode(errors="replace")[:200]
                if problem.code not in (408, 429, 500, 502, 503, 504) or attempt == TRIES:
                    raise ValueError(f"{url} refused with {problem.code}: {detail}") from problem
            except (OSError, HTTPException) as problem:
                if attempt == TRIES:
                    raise ValueError(f"{url} does not answer: {problem}") from problem
            except ValueError as problem:
                if attempt == TRIES:
                    raise ValueError(f"{url} sent an answer that is not JSON: {problem}") from problem
            time.sleep(WAIT_S * 2 ** (attempt - 1))
        raise AssertionError("every way out of the loop returns or raises")


def answer_through(
    server: Server,
    records: Sequence[KeyedRecord],
    template: Template,
    settings: Settings,
    max_new_tokens: int,
    out: AnswerFile,
    *,
    concurrency: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Answer the records that `out` lacks, `concurrency` at a time; `progress(rows, tokens)`, of this
    call, after every row."""
    for one in records:
        if name := template.rendered_format(one.record.prompt):
            raise ValueError(
                f"{one.record.source} row {one.record.row}: the prompt is already rendered ({name}), and a server "
                "wraps every prompt in its own template: give prompts without one, or answer with --target"
            )
    waiting = iter(out.missing(records))
    rows = tokens = 0
    with ThreadPoolExecutor(concurrency) as pool:

        def begin() -> dict[Future[dict[str, Any]], str]:
            one = next(waiting, None)
            if one is None:
                return {}
            return {pool.submit(_answer, server, one.record, template, settings, max_new_tokens): one.key}

        running: dict[Future[dict[str, Any]], str] = {}
        for _ in range(concurrency):
            running |= begin()
        try:
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    key, row = running.pop(future), future.result()
                    out.write(key, row)
                    tokens += sum(map(len, row.get("token_ids_by_turn", [row.get("token_ids", [])])))
                    rows += 1
                    if progress is not None:
                        progress(rows, tokens)
                    running |= begin()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)


def _answer(
    server: Server, record: Record, template: Template, settings: Settings, max_new_tokens: int
) -> dict[str, Any]:
    conversation, own = Conversation(record), True
    while not conversation.finished:
        messages = conversation.ask()
        answer = server.chat(messages, settings, max_new_tokens)
        text, stop, token_ids = answer["text"], answer["stop"], answer["token_ids"]
        prompt = answer["prompt_token_ids"] or template.prompt_ids(messages)
        own = own and bool(token_ids)
        conversation.take(
            text, stop, prompt, token_ids or _ids_of_text(template, [*messages, Message("assistant", text)], stop)
        )
    return conversation.row() | {"token_ids_from": "server" if own else "text"}


def _ids_of_text(template: Template, messages: Sequence[Message], stop: str) -> list[int]:
    """The ids of the last answer, without an end token if it was cut at its length limit."""
    _, ids = last_answer(template, messages)
    ended = bool(ids) and not template.tokenizer.decode(ids[-1:], skip_special_tokens=True)
    return ids[:-1] if ended and stop == "length" else ids
