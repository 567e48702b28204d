"""An OpenAI-style server on this machine that answers by a script."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Scripted:
    """A server on this machine: `replies(request number, body)` gives status and payload, or bytes as they are."""

    def __init__(self, reply: Callable[[int, dict[str, Any]], tuple[int, Any]]) -> None:
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
                data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
                self.send_response(status)
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
