"""Runs the application under uvicorn: its socket, its signals, its end.

SIGTERM or SIGINT once: no new requests, and what runs or waits is finished. Twice: what is not finished gets an error.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.infer.serving.engine_thread import EngineThread

if TYPE_CHECKING:
    from starlette.applications import Starlette

# How long the engine may take for the step that it is at, when the server ends at once.
LAST_STEP_S = 30.0
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def listen(host: str, port: int) -> socket.socket:
    """A socket for the server; port 0 takes a free one. ValueError if there is none to be had."""
    if not 0 <= port < 1 << 16:
        raise ValueError(f"--port must lie between 0 and 65535, not {port}")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
    except OSError as problem:
        raise ValueError(f"--host {host}: {problem.strerror or problem}") from problem
    made = socket.socket(family, kind, proto)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
    except OSError as problem:
        made.close()
        raise ValueError(
            f"cannot listen on {host}:{port}: {problem.strerror or problem}; try another --port"
        ) from problem
    return made


def url_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def read_keys(key_or_file: str) -> list[str]:
    """The API key itself, or those in a file, one a line."""
    if not key_or_file:
        return []
    path = Path(key_or_file).expanduser()
    if not path.is_file():
        if "/" in key_or_file:
            raise ValueError(f"--api_key {key_or_file}: there is no such file")
        return [key_or_file]
    keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not keys:
        raise ValueError(f"--api_key: {path} holds no key")
    return keys


def serve_until_stopped(
    app: Starlette, thread: EngineThread, sock: socket.socket, notice: Callable[[str], None]
) -> bool:
    """Serve on `sock` until a signal; whether everything that had begun was finished."""
    import uvicorn

    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", server_header=False)
    server = uvicorn.Server(config)
    aborted = False

    def stop(sig: int, frame: Any) -> None:
        nonlocal aborted
        name = signal.Signals(sig).name
        if not server.should_exit:
            notice(f"{name}: finishing what runs; again to end at once")
            server.should_exit = True
            # Requests that have arrived are still queued: their clients hold a connection.
            return
        notice(f"{name}: ending at once")
        aborted = True
        thread.abort()
        server.force_exit = True

    server.handle_exit = stop  # type: ignore[method-assign]
    thread.start()
    try:
        server.run(sockets=[sock])
    finally:
        thread.abort() if aborted else thread.finish()
        ended = thread.join(LAST_STEP_S)
    return ended and not aborted
