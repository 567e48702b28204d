"""An OpenAI-style server on this machine that answers by a script."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Scripted:
    """A server on this machine: `replies(request number, body)` gives status and payload, or bytes as they are, or an
    iterator of bytes to send one after the other. `page(path)`: the same for GET."""

    def __init__(
        self,
        reply: Callable[[int, dict[str, Any]], tuple[int, Any]],
        page: Callable[[str], tuple[int, Any]] = lambda path: (404, {}),
    ) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append(body | {"path": self.path})
                    outer.headers.append(dict(self.headers))
                    number = len(outer.requests)
                status, payload = reply(number, body)
                if status == 0:  # hang up
                    self.close_connection = True
                    return
                self._send(status, payload)

            def do_GET(self) -> None:
                self._send(*page(self.path))

            def _send(self, status: int, payload: Any) -> None:
                self.send_response(status)
                if isinstance(payload, Iterator):  # its end is that of the connection
                    self.end_headers()
                    for piece in payload:
                        self.wfile.write(piece)
                    self.close_connection = True
                    return
                data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def said(body: dict[str, Any], **choice: Any) -> dict[str, Any]:
    """An OpenAI-style response that repeats the question in capitals."""
    message = {"role": "assistant", "content": body["messages"][-1]["content"].upper()}
    return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"} | choice]}


def streamed(
    text: str, pause_s: float = 0.0, wait_s: float = 0.0, usage: dict[str, Any] | None = None
) -> Iterator[bytes]:
    """An OpenAI-style stream of one character a piece, `wait_s` before the first and `pause_s` before each other one.
    `usage` comes last; an empty one is left out."""
    counted = {"prompt_tokens": 5, "completion_tokens": len(text)} if usage is None else usage
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, *({"content": one} for one in text)]
    time.sleep(wait_s)
    for at, delta in enumerate(deltas):
        if at > 1:
            time.sleep(pause_s)
        yield _event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    if counted:
        yield _event({"choices": [], "usage": counted})
    yield b"data: [DONE]\n\n"


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"
