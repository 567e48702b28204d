"""The HTTP side: OpenAI's endpoints, `/health` and `/metrics`, as an ASGI application (Starlette).

A request is checked, made into rows and queued; then its answer is awaited beside its client, so that the rows of a
client that goes away leave at once.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from draftsmith.infer.contract.row import Row
from draftsmith.infer.serving.answer import PendingAnswer
from draftsmith.infer.serving.engine_thread import EngineThread
from draftsmith.infer.serving.errors import ApiError, bad_request, failed, unavailable
from draftsmith.infer.serving.formats import ChatFormat, CompletionFormat
from draftsmith.infer.serving.prompt_rows import PromptRows
from draftsmith.infer.serving.requests import ChatRequest, CompletionRequest, Sampled, parse

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

log = logging.getLogger(__name__)

T = TypeVar("T")
Handler = Callable[["Request"], Awaitable[Any]]
Format = ChatFormat | CompletionFormat


class ClientGoneError(Exception):
    """Nobody is there to read the answer."""


@dataclass(slots=True)
class OpenAIApp:
    """The endpoints over one engine.

    Args:
        model: the name that clients give.
        keys: API keys, any of which opens `/v1`; none: no key is needed.
        body_bytes: the largest body of a request.
        body_s: how long a client may take to send it.
    """

    thread: EngineThread
    rows: PromptRows
    model: str
    keys: Sequence[str] = ()
    body_bytes: int = 4 << 20
    body_s: float = 30.0
    began: int = field(default_factory=lambda: int(time.time()))
    # One thread renders and encodes prompts, so that a long one does not hold up the streams of others.
    _encoding: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "encoding"))

    def starlette(self, more: Sequence[Route] = ()) -> Starlette:
        """The application; `more`: further routes."""
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route

        open_to_all = [
            Route("/health", self.counted("/health", self._health), methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
        ]
        guarded = [
            ("/v1/models", self._models, "GET"),
            ("/v1/models/{name:path}", self._one_model, "GET"),
            ("/v1/chat/completions", self._chat, "POST"),
            ("/v1/completions", self._complete, "POST"),
        ]
        routes = [
            Route(path, self.counted(path, self._with_key(handler)), methods=[method])
            for path, handler, method in guarded
        ]

        async def unrouted(request: Request, problem: Exception) -> Response:
            """No such path, or no such method of it."""
            assert isinstance(problem, HTTPException)
            what = (
                f"{request.method} {request.url.path} is not served here: see /v1/models, /v1/chat/completions, /health"
            )
            error = ApiError(problem.status_code, what, code="not_found" if problem.status_code == 404 else None)
            self.thread.metrics.request("other", error.status, error.code or error.kind)
            return _error(error)

        return Starlette(routes=[*routes, *open_to_all, *more], exception_handlers={HTTPException: unrouted})

    # around every request

    def counted(self, endpoint: str, handler: Handler) -> Handler:
        """`handler`, whose errors become responses, and whose responses are counted."""

        async def handle(request: Request) -> Any:
            from starlette.requests import ClientDisconnect

            kind = ""
            try:
                response = await handler(request)
            except ApiError as problem:
                response, kind = _error(problem), problem.code or problem.kind
            except (ClientDisconnect, ClientGoneError):
                response, kind = _error(ApiError(499, "the client went away")), "client_gone"
            except Exception:
                log.exception("a request to %s failed", endpoint)
                error = failed("this is a bug of the server: its log has the traceback")
                response, kind = _error(error), "internal_error"
            self.thread.metrics.request(endpoint, response.status_code, kind)
            return response

        return handle

    def _with_key(self, handler: Handler) -> Handler:
        async def handle(request: Request) -> Any:
            if self.keys:
                given = request.headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")
                # All keys are compared, each in constant time.
                same = [hmac.compare_digest(given, key.encode()) for key in self.keys]
                if not any(same):
                    raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
            return await handler(request)

        return handle

    async def body(self, request: Request) -> bytes:
        """The body, as long as it is not too large and does not take too long."""
        stated = request.headers.get("content-length", "")
        if stated.isdecimal() and int(stated[:18]) > self.body_bytes:
            raise self._too_large()
        chunks, size = [], 0
        try:
            async with asyncio.timeout(self.body_s):
                async for chunk in request.stream():
                    chunks.append(chunk)
                    size += len(chunk)
                    if size > self.body_bytes:
                        raise self._too_large()
        except TimeoutError as problem:
            raise ApiError(408, f"the body did not arrive within {self.body_s:g} s") from problem
        return b"".join(chunks)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.body_bytes} bytes", code="body_too_large")

    async def encoded(self, make_rows: Callable[[], list[Row]]) -> list[Row]:
        """What `make_rows` makes, in the one thread that renders and encodes prompts."""
        return await asyncio.get_running_loop().run_in_executor(self._encoding, make_rows)

    # endpoints

    async def _health(self, request: Request) -> Response:
        if self.thread.ending:
            raise unavailable("this server is shutting down")
        if not self.thread.alive:
            raise failed("the engine has stopped")
        return reply({"status": "ok", "model": self.model} | self.thread.state())

    async def _metrics(self, request: Request) -> Response:
        from starlette.responses import Response

        return Response(self.thread.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        return reply({"object": "list", "data": [self._card()]})

    async def _one_model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return reply(self._card())

    def _card(self) -> dict[str, Any]:
        most = self.rows.target.max_positions
        return {
            "id": self.model, "object": "model", "created": self.began, "owned_by": "draftsmith", "max_model_len": most
        }  # fmt: skip

    def _check_model(self, name: str) -> None:
        if name != self.model:
            raise ApiError(
                404, f"there is no model {name!r} here, only {self.model!r}", param="model", code="model_not_found"
            )

    async def _chat(self, request: Request) -> Response | PieceStream:
        asked = parse(await self.body(request), ChatRequest)
        return await self._answer(request, asked, lambda: self.rows.of_chat(asked), ChatFormat)

    async def _complete(self, request: Request) -> Response | PieceStream:
        asked = parse(await self.body(request), CompletionRequest)
        return await self._answer(request, asked, lambda: self.rows.of_completion(asked), CompletionFormat)

    async def _answer(
        self, request: Request, asked: Sampled, make_rows: Callable[[], list[Row]], kind: type[Format]
    ) -> Response | PieceStream:
        self._check_model(asked.model)
        if asked.samples > self.thread.most_rows:
            raise bad_request(f"n must be at most {self.thread.most_rows} on this server, not {asked.samples}", "n")
        made = await self.encoded(make_rows)
        top = asked.wanted_logprobs
        answer = PendingAnswer(self.thread, made, self.rows.tokenizer, asked.samples, top)
        form = kind(self.model, self.rows.tokenizer, top is not None, bool(asked.return_token_ids))
        answer.submit()
        if asked.stream:
            return await _streamed(request, answer, form, len(made), asked.with_usage)
        try:
            done = await beside_client(request.receive, answer.whole())
        finally:
            answer.cancel()
        return reply(form.whole(done, answer.usage, answer.prompts))


class PieceStream:
    """An answer in pieces, as an ASGI response. When it ends, in whatever way, the answer's rows leave.

    `on_error` makes the last piece of an answer that fails on the way.
    """

    status_code = 200

    def __init__(
        self,
        answer: PendingAnswer,
        pieces: AsyncIterator[bytes],
        on_error: Callable[[ApiError], bytes],
        media_type: str,
    ) -> None:
        self._answer = answer
        self._pieces = pieces
        self._on_error = on_error
        self._headers = [(b"content-type", media_type.encode()), (b"cache-control", b"no-cache")]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await beside_client(receive, self._send(send))
        except ClientGoneError:
            pass
        finally:
            self._answer.cancel()

    async def _send(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self._headers})
        try:
            async for piece in self._pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except ApiError as problem:
            await send({"type": "http.response.body", "body": self._on_error(problem), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _streamed(request: Request, answer: PendingAnswer, form: Format, count: int, with_usage: bool) -> PieceStream:
    """The response begins after the first piece, so that what fails before it has a status of its own."""
    pieces = answer.pieces()
    try:
        first = await beside_client(request.receive, anext(pieces))
    except BaseException:
        answer.cancel()
        raise

    async def events() -> AsyncIterator[bytes]:
        for index in range(count):
            if (chunk := form.opening(index)) is not None:
                yield _event(chunk | no_usage)
        for chunk in form.piece(first):
            yield _event(chunk | no_usage)
        async for piece in pieces:
            for chunk in form.piece(piece):
                yield _event(chunk | no_usage)
        if with_usage:
            yield _event(form.usage(answer.usage))
        yield b"data: [DONE]\n\n"

    no_usage = {"usage": None} if with_usage else {}
    return PieceStream(answer, events(), lambda problem: _event(problem.to_json()), "text/event-stream; charset=utf-8")


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json_bytes(content) + b"\n\n"


async def beside_client(receive: Any, work: Awaitable[T]) -> T:
    """The result of `work`, unless the client goes away first."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def json_bytes(content: Any) -> bytes:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode(errors="backslashreplace")


def reply(content: Any, status: int = 200, headers: dict[str, str] | None = None, end: bytes = b"") -> Response:
    """JSON, and `end` behind it."""
    from starlette.responses import Response

    return Response(json_bytes(content) + end, status, headers, "application/json")


def _error(problem: ApiError) -> Response:
    wait = problem.retry_after_s
    return reply(problem.to_json(), problem.status, None if wait is None else {"Retry-After": str(math.ceil(wait))})
