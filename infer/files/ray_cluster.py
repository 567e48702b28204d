"""Ray on this machine, or a running cluster of it: imported, checked, joined and left (workers.py)."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOCAL = "local"
CONNECT_S = 3.0
GREET_S = 5.0
# A frame: length (3 bytes), type, flags, stream (4 bytes). Here one of empty settings.
HTTP2_SETTINGS = b"\x04"
HTTP2_OPENING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + HTTP2_SETTINGS + bytes(5)
# A Unix socket's path has at most 107 bytes, and Ray's add about 60 to its folder.
LONGEST_FOLDER = 40


def check_cluster(address: str) -> None:
    """ValueError, within seconds, for an address at which there is no Ray."""
    host, port = _address(address)
    _import_ray(address)
    if address == LOCAL:
        return
    try:
        with socket.create_connection((host, port), timeout=CONNECT_S) as connection:
            greeted = os.environ.get("RAY_USE_TLS", "0") != "0" or _greets(connection)
    except OSError as problem:
        raise ValueError(f"no Ray cluster answers at {address} ({problem}): start one with `ray start`") from problem
    if not greeted:
        raise ValueError(f"what listens at {address} is not Ray: give the HOST:PORT that `ray start --head` printed")


def _greets(connection: socket.socket) -> bool:
    """Whether the other end answers HTTP/2's opening as a gRPC server does, with its settings. Ray itself would try
    for a minute."""
    until = time.monotonic() + GREET_S
    answer = b""
    try:
        connection.sendall(HTTP2_OPENING)
        while len(answer) < 4 and (left := until - time.monotonic()) > 0:
            connection.settimeout(left)
            if not (some := connection.recv(4 - len(answer))):
                break
            answer += some
    except OSError:
        return False
    return answer[3:] == HTTP2_SETTINGS


def _address(ray: str) -> tuple[str, int]:
    host, colon, port = ("127.0.0.1", ":", "1") if ray == LOCAL else ray.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 1 << 16) or "/" in host:
        raise ValueError(f"--ray {ray!r}: give `local`, or the HOST:PORT of a running cluster such as 10.0.0.1:6379")
    return host.strip("[]"), int(port)


def _import_ray(address: str) -> Any:
    # Before the import, which reads them. Nothing is reported to Ray's makers, nor printed where results are.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] = "."
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "3")  # to join what is no Ray: a second each
    if address == LOCAL:
        # Without a cluster Ray listens on loopback only; the token keeps out the other users of this machine.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # As nice as this process. By default workers are nicer, and where a core is shared each is interrupted so often
        # that the same work costs more.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Ray's agents end so long after the rest was killed; by default they try for a minute to report it.
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ValueError("ray is not installed: pip install 'draftsmith[ray]'") from error
    return ray


@contextmanager
def joined(address: str, ray_workers: int | None) -> Iterator[Any]:
    """The module ray, connected; a local Ray listens on loopback only and leaves no folder behind."""
    ray = _import_ray(address)
    if ray.is_initialized():
        raise ValueError("this process is connected to Ray already")
    quiet: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    if address != LOCAL:
        try:
            with _without_stderr():
                ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError, AssertionError) as problem:
            line = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
            raise ValueError(
                f"cannot join the Ray cluster at {address} ({line}): run this on one of its machines, with its version "
                "of Ray and, if it asks for one, its RAY_AUTH_TOKEN"
            ) from problem
        try:
            yield ray
        finally:
            ray.shutdown()
        return
    folder = tempfile.mkdtemp(
        prefix="draftsmith-", dir=None if len(tempfile.gettempdir()) <= LONGEST_FOLDER else "/tmp"
    )
    cores = ray_workers or len(os.sched_getaffinity(0))
    try:
        try:
            ray.init(
                address="local",
                num_cpus=cores,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
                **quiet,
            )
        except Exception as problem:  # Ray raises no narrower one where it waited 30 s for its own processes
            line = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
            raise ValueError(
                f"Ray did not start on this machine ({line}): run again once it has less to do"
            ) from problem
        yield ray
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Ray's own code prints a warning for each attempt to connect."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
