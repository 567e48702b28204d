"""This server as a FastChat worker: its controller lists it, and its OpenAI server answers through it.

The protocol is written here and not taken from `fastchat.serve.base_model_worker`: that redirects this process's
standard output, writes a log file into the working directory, holds one worker per process in a global, and imports
FastChat's model adapters. It is six routes and two calls.

FastChat's servers render chats themselves, by a template that the worker names. Ours only marks the messages, and the
target's own chat template renders them here.
"""

from __future__ import annotations

import json
import logging
import threading
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

from draftsmith.infer.contract.row import Row
from draftsmith.infer.serving.answer import NewText, PendingAnswer, Usage
from draftsmith.infer.serving.app import OpenAIApp, PieceStream, beside_client, json_bytes, reply
from draftsmith.infer.serving.errors import ApiError, bad_request
from draftsmith.infer.serving.requests import ChatMessage, ChatRequest, CompletionRequest, parse

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.routing import Route

log = logging.getLogger(__name__)

HEART_BEAT_S = 45.0
TIMEOUT_S = 10.0
# FastChat's numbers (fastchat.constants).
NO_COLON_SINGLE = 4
ERROR_CODES = {400: 40001, 429: 42903}
INTERNAL_ERROR = 50001
CONTEXT_OVERFLOW = 40303
# What FastChat sends, and the name of the same in a completion request.
PARAMS = {
    "prompt": "prompt", "max_new_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p",
    "top_k": "top_k", "stop": "stop", "stop_token_ids": "stop_token_ids", "best_of": "best_of",
    "presence_penalty": "presence_penalty", "frequency_penalty": "frequency_penalty",
}  # fmt: skip


class FastChatWorker:
    """Registers `app` with the controller at `controller`; FastChat's servers reach it at `url`."""

    def __init__(self, app: OpenAIApp, controller: str, url: str) -> None:
        for address in (controller, url):
            if not address.startswith(("http://", "https://")):
                raise ValueError(f"the address {address!r} must begin with http:// or https://")
        self.app = app
        self.controller = controller.rstrip("/")
        self.url = url.rstrip("/")
        # The same after a restart: FastChat's server asks for the template once.
        self.mark = f"<|draftsmith-{app.rows.target.fingerprint()[:16]}|>"

    # to the controller

    @contextmanager
    def registered(self) -> Iterator[None]:
        """Register, and send heart beats; ValueError if the controller does not answer."""
        try:
            self._register()
        except (OSError, HTTPException, ValueError) as problem:
            raise ValueError(f"--controller {self.controller} does not answer: {problem}") from problem
        ended = threading.Event()
        beats = threading.Thread(target=self._beat, args=[ended], name="heart beat", daemon=True)
        beats.start()
        try:
            yield
        finally:
            ended.set()
            beats.join(TIMEOUT_S)

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(HEART_BEAT_S):
            try:
                state = {"worker_name": self.url, "queue_length": self._status()["queue_length"]}
                if not self._post("/receive_heart_beat", state)["exist"]:
                    self._register()
            except (OSError, HTTPException, ValueError, KeyError) as problem:
                log.warning("the FastChat controller does not answer: %s", problem)

    def _register(self) -> None:
        self._post(
            "/register_worker",
            {
                "worker_name": self.url,
                "check_heart_beat": True,
                "worker_status": self._status(),
                "multimodal": False,
            },
        )

    def _post(self, path: str, content: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(self.controller + path, json.dumps(content).encode(), headers)
        with urllib.request.urlopen(asked, timeout=TIMEOUT_S) as response:
            return json.load(response)

    def _status(self) -> dict[str, Any]:
        state = self.app.thread.state()
        return {"model_names": [self.app.model], "speed": 1, "queue_length": state["rows"] + state["waiting"]}

    # from FastChat's servers

    def routes(self) -> list[Route]:
        from starlette.routing import Route

        async def status(request: Request) -> Any:
            return reply(self._status())

        async def details(request: Request) -> Any:
            return reply({"context_length": self.app.rows.target.max_positions})

        async def template(request: Request) -> Any:
            return reply({"conv": self._conversation()})

        handlers = {
            "/worker_get_status": status,
            "/model_details": details,
            "/worker_get_conv_template": template,
            "/count_token": self._count,
            "/worker_generate": self._generate,
            "/worker_generate_stream": self._stream,
        }
        return [Route(path, self.app.counted(path, handler), methods=["POST"]) for path, handler in handlers.items()]

    def _conversation(self) -> dict[str, Any]:
        """A FastChat template that writes each message behind a mark and its role."""
        return {
            "name": "draftsmith",
            "system_template": f"{self.mark}system\n{{system_message}}",
            "system_message": "",
            "roles": [f"{self.mark}user\n", f"{self.mark}assistant\n"],
            "messages": [],
            "offset": 0,
            "sep_style": NO_COLON_SINGLE,
            "sep": "",
            "sep2": None,
            "stop_str": None,
            "stop_token_ids": None,
        }

    async def _count(self, request: Request) -> Any:
        rows = await self._rows(await self._params(request))
        return reply({"count": rows[0].prompt_tokens, "error_code": 0})

    async def _generate(self, request: Request) -> Any:
        try:
            params = await self._params(request)
            answer = await self._answer(params)
        except ApiError as problem:
            return reply(_error(problem))
        try:
            (found,) = await beside_client(request.receive, answer.whole())
        except ApiError as problem:
            return reply(_error(problem))
        finally:
            answer.cancel()
        return reply(_result(params, found, found.finish, answer.usage))

    async def _stream(self, request: Request) -> Any:
        try:
            params = await self._params(request)
            answer = await self._answer(params)
        except ApiError as problem:
            return reply(_error(problem), end=b"\0")
        whole = NewText(0)

        async def pieces() -> AsyncIterator[bytes]:
            async for piece in answer.pieces():
                whole.add(piece)
                # The text once without an end, as FastChat's own workers send it: its server drops the text of the end.
                yield json_bytes(_result(params, whole, "", answer.usage)) + b"\0"
            yield json_bytes(_result(params, whole, whole.finish, answer.usage)) + b"\0"

        return PieceStream(
            answer, pieces(), lambda problem: json_bytes(_error(problem)) + b"\0", "application/octet-stream"
        )

    async def _params(self, request: Request) -> dict[str, Any]:
        try:
            found = json.loads(await self.app.body(request))
        except (ValueError, RecursionError) as problem:
            raise bad_request(f"the body is not JSON: {problem}") from problem
        if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
            raise bad_request("the body must be a JSON object with a prompt")
        if found.get("logprobs") is not None:
            raise bad_request("log-probabilities are not served through FastChat: ask this server itself", "logprobs")
        return found

    async def _rows(self, params: dict[str, Any]) -> list[Row]:
        """The row that FastChat's parameters ask for."""
        most = self.app.rows.max_new_tokens
        given = {name: params[key] for key, name in PARAMS.items() if params.get(key) is not None}
        if isinstance(given.get("max_tokens"), int):
            given["max_tokens"] = min(given["max_tokens"], most)
        asked = parse(json.dumps({"model": self.app.model, **given}).encode(), CompletionRequest)
        messages = self._messages(params["prompt"])
        return await self.app.encoded(lambda: self._made(asked, messages))

    def _made(self, asked: CompletionRequest, messages: list[ChatMessage]) -> list[Row]:
        if messages:
            chat = ChatRequest(model=self.app.model, messages=messages)
            ids = self.app.rows.chat_ids(chat)
            asked = asked.model_copy(update={"prompt": ids})
        return self.app.rows.of_completion(asked)

    def _messages(self, prompt: str) -> list[ChatMessage]:
        """The messages of a prompt that `_conversation` wrote; empty for any other."""
        before, *marked = prompt.split(self.mark)
        if before or not marked:
            return []
        messages = []
        for part in marked:
            role, _, text = part.partition("\n")
            if role not in ("system", "user", "assistant"):
                raise bad_request("the prompt is not as this worker's template writes it", "prompt")
            messages.append(ChatMessage(role=role, content=text))  # type: ignore[arg-type]
        if messages[0].role == "system" and not messages[0].content:
            del messages[0]
        if messages and messages[-1].role == "assistant" and not messages[-1].content:
            del messages[-1]
        return messages

    async def _answer(self, params: dict[str, Any]) -> PendingAnswer:
        rows = await self._rows(params)
        answer = PendingAnswer(self.app.thread, rows, self.app.rows.tokenizer, 1)
        answer.submit()
        return answer


def _result(params: dict[str, Any], found: NewText, finish: str, usage: Usage) -> dict[str, Any]:
    before = params["prompt"] if params.get("echo") else ""
    return {
        "text": before + found.text,
        "error_code": 0,
        "usage": usage.to_json(),
        "finish_reason": finish or None,
        "logprobs": None,
    }


def _error(problem: ApiError) -> dict[str, Any]:
    code = ERROR_CODES.get(problem.status, INTERNAL_ERROR)
    return {"text": str(problem), "error_code": CONTEXT_OVERFLOW if problem.code == "context_length_exceeded" else code}
