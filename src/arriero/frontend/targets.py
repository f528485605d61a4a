"""How soon a client wants its first token: the header `x-slo-ttft-ms`, as llm-d's scheduler reads it."""

from __future__ import annotations

import math
from contextvars import ContextVar

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from arriero.frontend.openai_errors import error_response

TTFT_HEADER = "x-slo-ttft-ms"

_current: ContextVar[float | None] = ContextVar("arriero_ttft_target", default=None)


def current_ttft_target_s() -> float | None:
    """Of the HTTP request on whose behalf this code runs; None if it has none."""
    return _current.get()


class Targets:
    """ASGI middleware; inside of what checks API keys."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        text = Headers(scope=scope).get(TTFT_HEADER) if scope["type"] == "http" else None
        if text is None:
            await self._app(scope, receive, send)
            return
        target_s = _seconds(text)
        if target_s is None:
            message = f"{TTFT_HEADER}: {text[:40]!r} is no target: send milliseconds, more than 0, or leave it out"
            await error_response(400, message, "BadRequestError")(scope, receive, send)
            return
        token = _current.set(target_s)
        try:
            await self._app(scope, receive, send)
        finally:
            _current.reset(token)


def _seconds(text: str) -> float | None:
    try:
        seconds = float(text) / 1e3
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds > 0 else None
