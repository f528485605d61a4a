"""Errors in OpenAI's shape."""

from __future__ import annotations

import math

from fastapi.responses import JSONResponse

from arriero.core.errors import ArrieroError


def error_response(status: int, message: str, kind: str, retry_after_s: float | None = None) -> JSONResponse:
    """``{"error": {"message", "type", "param", "code"}}``; with ``retry_after_s``, also the header that says so."""
    body = {"message": message, "type": kind, "param": None, "code": status}
    headers = {} if retry_after_s is None else {"retry-after": str(math.ceil(retry_after_s))}
    return JSONResponse({"error": body}, status_code=status, headers=headers)


def answer_to(error: ArrieroError) -> JSONResponse:
    """How a client hears of ``error``."""
    return error_response(error.status, str(error), type(error).__name__, error.retry_after_s)
