"""Errors as OpenAI's clients read them: an HTTP status, and a body with message, type, param and code."""

from __future__ import annotations

from typing import Any

INVALID = "invalid_request_error"


class ApiError(Exception):
    """A request that gets an error instead of an answer. `retry_after_s`: when to send it again, if that helps."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def to_json(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def overloaded(message: str, retry_after_s: float) -> ApiError:
    """The queue is full."""
    return ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", retry_after_s=retry_after_s)


def unavailable(message: str, retry_after_s: float | None = None) -> ApiError:
    """The server is shutting down, or the request waited for too long."""
    return ApiError(503, message, kind="server_error", code="unavailable", retry_after_s=retry_after_s)


def failed(message: str) -> ApiError:
    """The server could not decode this request."""
    return ApiError(500, message, kind="server_error", code="decoding_failed")
