"""Reconnecting over HTTP: a stream that was asked to be resumable is fetched again with `Last-Event-ID`."""

from __future__ import annotations

import hashlib
import math
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from arriero.core.config import HttpConfig
from arriero.core.errors import ArrieroError
from arriero.frontend.admin import ErrorRoute, authorize
from arriero.frontend.openai_errors import answer_to, error_response
from arriero.frontend.request_ids import HEADER as REQUEST_ID
from arriero.frontend.resumable import HEADER, ResumableStream, ResumableStreams


class Reconnect:
    """ASGI middleware. Requests without the header pass."""

    def __init__(self, app: ASGIApp, streams: ResumableStreams, config: HttpConfig) -> None:
        self._app = app
        self._streams = streams
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if HEADER not in headers:
            await self._app(scope, receive, send)
            return
        grace_s = _seconds(headers[HEADER])
        if grace_s is None:
            message = f"{HEADER}: {headers[HEADER]!r} is invalid: send a number of seconds, 0 or more"
            await error_response(HTTPStatus.BAD_REQUEST, message, "BadRequestError")(scope, receive, send)
            return
        grace_s = min(grace_s, self._config.max_resume_s)
        try:
            self._streams.require_free(headers[REQUEST_ID])
        except ArrieroError as error:
            await answer_to(error)(scope, receive, send)
            return
        stream = ResumableStream(headers[REQUEST_ID], _owner(headers), grace_s, self._streams)
        await stream.run(self._app, scope, receive, send)


def attach_reconnect(app: FastAPI, streams: ResumableStreams, api_keys: list[str]) -> None:
    """Add the endpoints to ``app``; the middleware that fills ``streams`` is the server's to put in its place."""
    app.include_router(_router(streams, api_keys))


def _router(streams: ResumableStreams, api_keys: list[str]) -> APIRouter:
    router = APIRouter(tags=["arriero"], dependencies=[Depends(authorize(api_keys))], route_class=ErrorRoute)

    @router.get("/requests/{request_id:path}/stream", responses={200: {"content": {"text/event-stream": {}}}})
    async def resume(request_id: str, request: Request) -> Any:
        """The rest of a stream that was begun with `x-arriero-resume`, behind the event that `Last-Event-ID` names.

        404 if there is none such (any more), 410 if events behind `Last-Event-ID` are not kept any more.
        """
        stream = streams.find(request_id, _owner(request.headers))
        after = _event_number(request.headers.get("last-event-id", "0"), stream.journal.last)
        stream.journal.after(after)
        return _Rest(stream, after)

    @router.delete("/requests/{request_id:path}/stream", status_code=HTTPStatus.NO_CONTENT)
    async def abandon(request_id: str, request: Request) -> None:
        """End the request of a resumable stream at once: a closed connection alone does not."""
        streams.find(request_id, _owner(request.headers)).abandon()

    return router


class _Rest(Response):
    """The rest of a stream as an answer."""

    def __init__(self, stream: ResumableStream, after: int) -> None:
        super().__init__()
        self._stream, self._after = stream, after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        await self._stream.resume(receive, send, self._after)


def _owner(headers: Headers) -> bytes:
    """Who may resume a stream: whoever sends the same `Authorization` as the client that began it."""
    return hashlib.sha256(headers.get("authorization", "").encode()).digest()


def _seconds(value: str) -> float | None:
    try:
        seconds = float(value)
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _event_number(value: str, last: int) -> int:
    if not (value.isascii() and value.isdigit() and len(value) < 20 and int(value) <= last):
        raise HTTPException(
            400, f"Last-Event-ID: {value!r} is invalid: send the last `id` that arrived, {last} or less"
        )
    return int(value)
