"""Request ids over HTTP: what a client calls its request is what vLLM calls it, and what the answer repeats.

vLLM builds a request's id from the header `X-Request-Id` ("cmpl-<id>", "chatcmpl-<id>").
"""

from __future__ import annotations

import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from arriero.frontend.openai_errors import error_response

HEADER = "x-request-id"
ALIASES = (HEADER, "x-correlation-id", "request-id")
"""The first of these that a request has is its id."""

MAX_LENGTH = 256


class RequestIds:
    """ASGI middleware; the outermost, so that refusals repeat the id too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = next((headers[name] for name in ALIASES if headers.get(name)), "") or uuid.uuid4().hex
        if len(request_id) > MAX_LENGTH or not request_id.isprintable():
            message = f"the request id has {len(request_id)} characters: send at most {MAX_LENGTH}, all printable"
            await error_response(400, message, "BadRequestError")(scope, receive, send)
            return
        if headers.get(HEADER) != request_id:
            scope = {**scope, "headers": [*scope["headers"], (HEADER.encode(), request_id.encode("latin-1"))]}

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).setdefault(HEADER, request_id)
            await send(message)

        await self._app(scope, receive, named)
